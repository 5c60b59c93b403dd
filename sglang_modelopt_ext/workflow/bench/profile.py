"""A decode step under the server's CUDA graphs, kernel by kernel, out of the Chrome trace that SGLang's own profiler writes."""

from __future__ import annotations

import ast
import functools
import gzip
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sglang_modelopt_kernels
from sglang_modelopt_ext.checkpoint.tensors import read_headers, read_json_object
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.bench.load import Deadline, Load

STEPS = 10
"""Decode steps in a trace; the interval from the first kernel of one to that of the next is a step."""
PROMPT = 128
OWN_GROUPS = {
    "gemm": "products, this package",
    "moe": "experts, this package",
    "attention": "attention, this package",
    "quantize": "rounding, this package",
}
"""Groups of this package's kernels, by their folder in ``sglang_modelopt_kernels``."""
OTHER_PRODUCTS = "products, others"
OTHER_GROUPS = (
    ("copies", r"memcpy|memset"),
    ("communication", r"nccl|all_?reduce|all_?gather|reduce_?scatter"),
    ("sampling", r"argmax|softmax.*sampl|sampl|top_?k_?top_?p|multinomial"),
    ("norms", r"norm"),
    ("attention, others", r"flash|fmha|attn|attention|mla|set_kv|store_cache|cache"),
    ("rope", r"rope|rotary"),
    ("rounding, others", r"quant"),
    (OTHER_PRODUCTS, r"gemm|gemv|nvjet|cutlass|matmul|splitk|xmma|marlin|mm_"),
    ("activation", r"silu|gelu|act_and_mul|swiglu"),
)
"""Groups of other kernels, by patterns of their names: the first that matches counts, and the rest is ``other``."""
_COMPILED = re.compile(r"\b(?:triton|gluon)\.jit\b")
"""The decorators of kernels."""
_KERNELS = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})


@dataclass(frozen=True)
class KernelTime:
    """A kernel in a decode step.

    Attributes:
        name: as the trace has it.
        group: of kernels with one purpose.
        launches: in a step.
        microseconds: in a step, of all launches.
        bytes: read or written in a step where known, else None.
    """

    name: str
    group: str
    launches: float
    microseconds: float
    bytes: float | None = None


@dataclass(frozen=True)
class Profile:
    """A profiled decode step.

    Attributes:
        requests: their number, decoded together.
        layers: of the model.
        steps: whole steps in the trace; launches and microseconds of kernels are their means.
        microseconds: from one step's first kernel to the next one's, the median.
        idle: microseconds of a step in which no kernel runs.
        kernels: the longest first.
        product_bytes: of weights that a step reads, by group of products; empty where the routing decides.
    """

    requests: int
    layers: int
    steps: int
    microseconds: float
    idle: float
    kernels: list[KernelTime]
    product_bytes: dict[str, int]

    def groups(self) -> list[KernelTime]:
        """Return the sums of each group, the longest first."""
        sums: dict[str, list[KernelTime]] = {}
        for kernel in self.kernels:
            sums.setdefault(kernel.group, []).append(kernel)
        rows = []
        for group, members in sums.items():
            known = [kernel.bytes for kernel in members if kernel.bytes is not None]
            size = self.product_bytes.get(group, sum(known) if known else None)
            launches, time = sum(k.launches for k in members), sum(k.microseconds for k in members)
            rows.append(KernelTime(group, group, launches, time, size))
        return sorted(rows, key=lambda row: -row.microseconds)


def capture(load: Load, model: Path, requests: int, folder: Path, deadline: Deadline) -> Profile:
    """Profile decode steps of ``requests`` requests on a running server.

    The server needs ``SGLANG_PROFILE_BY_STAGE_DECODE_MIN_BS`` = ``requests`` in its environment, so that no step with fewer of them
    counts. Its trace of the prompts is not used.

    Args:
        load: requests to the server.
        model: the folder of the model it serves.
        requests: their number, decoded together.
        folder: for traces; made.
        deadline: for all of it.

    Raises:
        ModelOptExtError: no trace was written, or none of a CUDA graph.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.trace.json.gz"):
        old.unlink()
    wanted = {"output_dir": str(folder), "num_steps": STEPS, "profile_by_stage": True, "activities": ["GPU"]}
    load.post("/start_profile", wanted | {"with_stack": False, "record_shapes": False}, deadline.left())
    load.ask(load.prompts(f"profile {requests}", requests, PROMPT), 4 * STEPS, deadline)
    load.flush()
    traces = sorted(folder.glob("*DECODE.trace.json.gz"))
    if not traces:
        raise ModelOptExtError.at(folder, "trace", f"one of {STEPS} decode steps", "none")
    return read_trace(traces[0], model, requests)


def read_trace(file: Path, model: Path, requests: int) -> Profile:
    """Read a Chrome trace, gzipped JSON. Raises ModelOptExtError when it has fewer than two launches of a CUDA graph."""
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        events = json.load(opened)["traceEvents"]
    kernels = [event for event in events if event.get("ph") == "X" and event.get("cat") in _KERNELS]
    kernels.sort(key=lambda event: event["ts"])
    starts = _step_starts(kernels)
    if len(starts) < 2:
        raise ModelOptExtError.at(file, "decode steps", "two or more launches of a CUDA graph", len(starts))
    inside = [kernel for kernel in kernels if starts[0] <= kernel["ts"] < starts[-1]]
    steps = len(starts) - 1
    rows = _rows(inside, steps)
    layers = read_json_object(model / "config.json")["num_hidden_layers"]
    length = statistics.median(right - left for left, right in itertools.pairwise(starts))
    idle = (starts[-1] - starts[0] - _busy(inside, starts[-1])) / steps
    own = any(row.group == OWN_GROUPS["gemm"] for row in rows)
    return Profile(requests, layers, steps, length, idle, rows, product_bytes(model, own))


def _step_starts(kernels: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the times of the first kernels of the model's graphs.

    Kernels of one correlation were launched by one call: several of them are a graph. A graph with less than half the kernels of
    the largest is not the model's.
    """
    by_launch: dict[int, list[float]] = {}
    for kernel in kernels:
        by_launch.setdefault(kernel["args"]["correlation"], []).append(kernel["ts"])
    least = max(2, max((len(times) for times in by_launch.values()), default=0) / 2)
    return sorted(min(times) for times in by_launch.values() if len(times) >= least)


def _rows(kernels: Iterable[Mapping[str, Any]], steps: int) -> list[KernelTime]:
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel["name"], []).append(kernel)
    rows = []
    for name, launches in by_name.items():
        sizes = [launch["args"]["bytes"] for launch in launches if "bytes" in launch["args"]]
        time = sum(launch["dur"] for launch in launches) / steps
        size = sum(sizes) / steps if sizes else None
        rows.append(KernelTime(name, group_of(name), len(launches) / steps, time, size))
    return sorted(rows, key=lambda row: -row.microseconds)


def _busy(kernels: Sequence[Mapping[str, Any]], end: float) -> float:
    """Return the microseconds in which at least one of ``kernels``, ordered by start, runs before ``end``."""
    busy, until = 0.0, float("-inf")
    for kernel in kernels:
        left, right = max(kernel["ts"], until), min(kernel["ts"] + kernel["dur"], end)
        busy += max(0.0, right - left)
        until = max(until, right)
    return busy


def group_of(name: str) -> str:
    """Return the group of a kernel, by its name."""
    own = own_kernels().get(name)
    if own is not None:
        return OWN_GROUPS[own]
    return next((group for group, part in OTHER_GROUPS if re.search(part, name, re.IGNORECASE)), "other")


@functools.cache
def own_kernels() -> dict[str, str]:
    """Return this package's Triton kernels by name, each with its folder, read from their sources."""
    root = Path(sglang_modelopt_kernels.__path__[0])
    found = {}
    for file in root.rglob("*.py"):
        folder = file.relative_to(root).parts[0]
        if folder not in OWN_GROUPS:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(_COMPILED.search(ast.unparse(d)) for d in node.decorator_list):
                found[node.name] = folder
    return found


def product_bytes(model: Path, own: bool) -> dict[str, int]:
    """Return the bytes of weights that a decode step of a dense model reads, by group of products.

    Args:
        model: the checkpoint's folder; empty for a mixture, whose routing decides, and where no weights are stored.
        own: whether this package computes the decoder's layers; the head is always computed by others.
    """
    if not any(model.glob("*.safetensors")):
        return {}
    headers = read_headers(model)
    if any(".experts." in name for name in headers):
        return {}
    decoder = sum(
        tensor.num_bytes for name, tensor in headers.items() if ".layers." in name and not name.endswith("norm.weight")
    )
    head = sum(tensor.num_bytes for name, tensor in headers.items() if name.startswith("lm_head."))
    return {OWN_GROUPS["gemm"]: decoder, OTHER_PRODUCTS: head} if own else {OTHER_PRODUCTS: decoder + head}
