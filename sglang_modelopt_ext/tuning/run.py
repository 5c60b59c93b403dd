"""The measurement of every backend that supports the layers of a checkpoint, on the GPU at hand, for a tuning file.

Layers are built as a server builds them (scheme, fused shards, a rank's part), with random weights: only shapes and formats are
the checkpoint's. A backend is timed only after it passed its check before serving, and another check on the layer's own sizes. The
time is that of the whole layer, from the model's activations to its output, in a captured CUDA graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from sglang_modelopt_ext.backends.base import Backend, LinearRequest
from sglang_modelopt_ext.backends.experts.base import ExpertBackend
from sglang_modelopt_ext.backends.select import BACKENDS, EXPERT_BACKENDS
from sglang_modelopt_ext.backends.timings import (
    FORMAT,
    LayerKey,
    Result,
    TuningFile,
    gpu_of,
    key_of,
    merged,
    objection,
    read,
    versions,
)
from sglang_modelopt_ext.checkpoint.experts import is_expert
from sglang_modelopt_ext.checkpoint.linears import QuantizedLinear
from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME, canonical_name
from sglang_modelopt_ext.checkpoint.reader import FUSED_SHARDS, Checkpoint, assumption, read_checkpoint
from sglang_modelopt_ext.checkpoint.tensors import read_json_object
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.layers.linear import LinearProduct
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_ext.schemes.table import math_of
from sglang_modelopt_ext.tuning.experts import ExpertKind, experts_of, measure_experts
from sglang_modelopt_ext.tuning.sample import (
    TOLERANCE,
    Sample,
    ends,
    filling_the_cache,
    measure_backends,
    random_shard,
)
from sglang_modelopt_kernels.timing import median_us

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ROW_PARALLEL = ("o_proj", "down_proj")
"""Layers that are split over the ranks along K; all others are split along N."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Timer = Callable[[Callable[[int], object]], float]
"""A function that returns the microseconds of ``call(index)``, where ``index`` is the repetition, such as :func:`median_us`."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One kind of layer of a checkpoint on one rank, and the number of such layers.

    Attributes:
        scheme: the layer's quantization.
        n, k: output and input features of a rank's part of the (fused) layer.
        name: the name of the first such layer.
        count: the number of such layers.
    """

    scheme: LayerScheme
    n: int
    k: int
    name: str
    count: int = 1


def layers_of(checkpoint: Checkpoint, tp_size: int = 1) -> list[Layer]:
    """Return the kinds of quantized layers of one rank, in the order of the checkpoint, without the embedding (no product).

    Raises:
        ModelOptExtError: ``tp_size`` does not divide a layer.
    """
    if tp_size < 1:
        raise ModelOptExtError.at("command line", "--tp-size", "a positive number", tp_size)
    kinds: dict[tuple[LayerScheme, int, int], Layer] = {}
    for name, shards in _fused(checkpoint):
        leaf = name.rpartition(".")[2]
        if leaf in ROW_PARALLEL:
            n, k = shards[0].n, _divided(shards[0].k, tp_size, name)
        else:
            n, k = sum(_outputs(checkpoint, shard, tp_size) for shard in shards), shards[0].k
        key = shards[0].scheme, n, k
        found = kinds.get(key)
        kinds[key] = Layer(*key, name) if found is None else dataclasses.replace(found, count=found.count + 1)
    return list(kinds.values())


def _fused(checkpoint: Checkpoint) -> Iterator[tuple[str, list[QuantizedLinear]]]:
    """Yield ``(name, shards in order)`` of each layer that SGLang builds, fused ones under the fused name."""
    seen = set()
    for canonical, linear in checkpoint.linears.items():
        parent, _, leaf = canonical.rpartition(".")
        if canonical in seen or not parent or leaf.startswith("embed") or is_expert(linear.name):
            continue
        fused, names = next(((f, s) for f, s in FUSED_SHARDS.items() if leaf in s), (leaf, (leaf,)))
        members = [canonical_name(f"{parent}.{name}") for name in names]
        seen.update(members)
        yield f"{parent}.{fused}", [checkpoint.linears[member] for member in members] if len(names) > 1 else [linear]


def _outputs(checkpoint: Checkpoint, shard: QuantizedLinear, tp_size: int) -> int:
    """Return the output features of one rank's part of a shard; with fewer KV heads than ranks, each head is on several ranks."""
    if shard.name.endswith((".k_proj", ".v_proj")) and tp_size > 1:
        config = read_json_object(checkpoint.folder / CONFIG_NAME)
        heads = config.get("num_attention_heads")
        head = config.get("head_dim") or (config["hidden_size"] // heads if heads else 0)
        if head and shard.n // head < tp_size:
            return int(head)
    return _divided(shard.n, tp_size, shard.name)


def _divided(size: int, tp_size: int, name: str) -> int:
    if size % tp_size:
        raise ModelOptExtError.at("command line", "--tp-size", f"a divisor of the {size} features of {name}", tp_size)
    return size // tp_size


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the model's type by config.json. Raises ModelOptExtError when it states none, or one that is not supported."""
    config = read_json_object(checkpoint.folder / CONFIG_NAME)
    name = config.get("dtype") or config.get("torch_dtype")
    if name not in DTYPES:
        raise ModelOptExtError.at(checkpoint.folder / CONFIG_NAME, "dtype", f"one of {', '.join(DTYPES)}", name)
    return DTYPES[name]


def tune(
    folder: Path,
    *,
    tp_size: int = 1,
    tokens: Sequence[int] = TOKENS,
    device: str = "cuda",
    timer: Timer = median_us,
    backends: Sequence[Backend] = BACKENDS,
    expert_backends: Sequence[ExpertBackend] = EXPERT_BACKENDS,
    report: Callable[[str], object] = print,
) -> TuningFile:
    """Measure every kind of layer of the checkpoint in ``folder`` with every backend that supports it.

    Args:
        folder: the checkpoint.
        tp_size: the number of tensor-parallel ranks.
        tokens: the numbers of tokens to measure.
        device: the GPU.
        timer: returns the microseconds of a call.
        backends, expert_backends: the candidates for linear layers, and for products of experts.
        report: called with one line for each layer and backend.

    Raises:
        ModelOptExtError: the checkpoint is wrong, or ``tp_size`` does not divide a layer.
    """
    checkpoint = read_checkpoint(folder)
    if assumed := assumption(checkpoint.config):
        report(assumed)
    return measure(
        layers_of(checkpoint, tp_size),
        experts_of(checkpoint, tp_size),
        torch.device(device),
        model_dtype(checkpoint),
        tokens=tokens,
        timer=timer,
        backends=backends,
        expert_backends=expert_backends,
        report=report,
    )


def measure(
    layers: Sequence[Layer],
    experts: Sequence[ExpertKind],
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: Sequence[int] = TOKENS,
    timer: Timer = median_us,
    backends: Sequence[Backend] = BACKENDS,
    expert_backends: Sequence[ExpertBackend] = EXPERT_BACKENDS,
    report: Callable[[str], object] = print,
) -> TuningFile:
    """Measure linear layers and products of experts with every backend that supports them; see :func:`tune`."""
    results: dict[LayerKey, Result] = {}
    for layer in layers:
        request = LinearProduct(layer.scheme, "tuning", layer.name, math_of(layer.scheme), dtype).request(
            device, layer.n, layer.k
        )
        if key_of(request) in results:
            continue
        report(f"{layer.name} and its like ({layer.count}): {layer.scheme.describe()}, {layer.n} x {layer.k}")
        times, rejected = _measure(layer, request, device, tokens, timer, backends, report)
        results[key_of(request)] = Result(key_of(request), times, rejected)
    for kind in experts:
        described = f"{kind.scheme.describe()}, {kind.experts} experts of {kind.n} x {kind.k}"
        report(f"{kind.name} and its like ({kind.count}): {described}")
        result = measure_experts(kind, device, dtype, tokens, timer, expert_backends, report)
        results[result.layer] = result
    flag = Device.of(device).flag
    return TuningFile(FORMAT, gpu_of(device), versions(), list(tokens), list(results.values()), flag)


def _measure(
    layer: Layer,
    request: LinearRequest,
    device: torch.device,
    tokens: Sequence[int],
    timer: Timer,
    backends: Sequence[Backend],
    report: Callable[[str], object],
) -> tuple[dict[str, list[float]], dict[str, str]]:
    stored = random_shard(request.scheme, layer.n, layer.k, request.dtype, device)
    sample = Sample.of(request.scheme, stored)

    def measure(backend: Backend) -> list[float]:
        copies = _copies(layer, request, backend, stored)
        return [_time(copies, sample, m, request, timer) for m in tokens]

    return measure_backends(backends, request, measure, report)


@dataclasses.dataclass(frozen=True)
class _Copy:
    """One copy of the prepared layer, on a module as in a server."""

    product: LinearProduct
    module: torch.nn.Module

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self.product.apply(self.module, x)


def _copies(layer: Layer, request: LinearRequest, backend: Backend, stored: dict[str, torch.Tensor]) -> list[_Copy]:
    """Return prepared copies of the layer that together fill the GPU's cache, or one for each repetition if these are fewer.

    Raises:
        ValueError: the backend fails its check before serving.
    """

    def make(module: torch.nn.Module) -> _Copy:
        product = LinearProduct(layer.scheme, "tuning", layer.name, request.math, request.dtype)
        product.prepare(module, [stored], layer.n, layer.k, backends=[backend])
        return _Copy(product, module)

    return filling_the_cache(make)


def _time(copies: Sequence[_Copy], sample: Sample, m: int, request: LinearRequest, timer: Timer) -> float:
    """Return the microseconds of the layer for ``m`` tokens. Raises ValueError when its result is wrong against float64."""
    device = sample.rows.device
    x = torch.randn(m, request.k, generator=torch.Generator(device).manual_seed(m), device=device).to(request.dtype)
    some = ends(m, device)
    expected = sample.outputs(x[some])
    y = copies[0].apply(x)[some][:, sample.rows].double()
    error = float(((y - expected).norm(dim=1) / expected.norm(dim=1)).max())
    if not error < TOLERANCE:
        raise ValueError(f"is wrong: relative error {error:.2g} with {m} tokens")
    return timer(lambda index: copies[index % len(copies)].apply(x))


def merge(path: Path, content: TuningFile) -> TuningFile:
    """Return ``content`` with the further layers of the file at ``path``, if there is one.

    Raises:
        ModelOptExtError: the file is no tuning file, or one of another GPU, other versions or other numbers of tokens.
    """
    if not path.exists():
        return content
    before = read(path)
    reason = objection(before, content.gpu)
    if reason is None and before.tokens != content.tokens:
        reason = f"was measured for {before.tokens} tokens, these are {content.tokens}"
    if reason is not None:
        raise ModelOptExtError.at(path, "content", "a file that can be added to", f"one that {reason}")
    return merged(before, content)
