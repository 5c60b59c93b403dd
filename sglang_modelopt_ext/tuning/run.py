"""Measures, on the GPU at hand, every backend that takes the layers of a checkpoint, and writes a tuning file.

Layers are built as a server builds them (scheme, fused shards, a rank's part), with random weights: only shapes and formats are
the checkpoint's. A backend is timed only after it passed the check every backend passes at load, and another one on the layer's own
sizes; what is timed is the whole layer, from the model's activations to its output, in a captured CUDA graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
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
    objection,
    read,
    versions,
)
from sglang_modelopt_ext.checkpoint.experts import is_expert
from sglang_modelopt_ext.checkpoint.linears import QuantizedLinear
from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME, canonical_name
from sglang_modelopt_ext.checkpoint.reader import FUSED_SHARDS, Checkpoint, assumption, read_checkpoint
from sglang_modelopt_ext.checkpoint.tensors import read_json_object
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.layers.linear import LinearProduct
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_ext.schemes.table import math_of
from sglang_modelopt_ext.tuning.experts import experts_of, measure_experts
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
"""Layers whose inputs are cut over the ranks; all others have their outputs cut."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Timer = Callable[[Callable[[int], object]], float]
"""Microseconds of ``call(index)`` for a call that takes the number of its repetition: :func:`median_us`."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One kind of layer of a checkpoint: what a rank holds of it, and how many there are.

    Attributes:
        scheme: how it is quantized.
        n, k: output and input features of a rank's part of the (fused) layer.
        name: that of the first one.
        count: how many layers of the model are alike.
    """

    scheme: LayerScheme
    n: int
    k: int
    name: str
    count: int = 1


def layers_of(checkpoint: Checkpoint, tp_size: int = 1) -> list[Layer]:
    """The kinds of quantized layers of one rank, in the order of the checkpoint, without the embedding, which is looked up.

    Raises ModelOptExtError when ``tp_size`` does not divide a layer.
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
    """The layers as SGLang fuses them, with their shards in order."""
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
    """Output features of one rank's part of a shard; ranks beyond the number of KV heads share these."""
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
    """The type the checkpoint's model is served in. Raises ModelOptExtError when its configuration has none known here."""
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
    """Measures the layers of the checkpoint in ``folder``.

    Args:
        folder: the checkpoint.
        tp_size: ranks that share every layer.
        tokens: numbers of tokens to measure.
        device: where.
        timer: what measures one call.
        backends, expert_backends: what to measure, where it takes a layer, or a product of experts.
        report: gets one line for each layer and backend.

    Raises:
        ModelOptExtError: the checkpoint, or a size that ``tp_size`` does not divide.
    """
    checkpoint = read_checkpoint(folder)
    if assumed := assumption(checkpoint.config):
        report(assumed)
    where, dtype = torch.device(device), model_dtype(checkpoint)
    results: dict[LayerKey, Result] = {}
    for layer in layers_of(checkpoint, tp_size):
        asked = LinearProduct(layer.scheme, folder, layer.name, math_of(layer.scheme), dtype).request(
            where, layer.n, layer.k
        )
        if key_of(asked) in results:
            continue
        report(f"{layer.name} and its like ({layer.count}): {layer.scheme.describe()}, {layer.n} x {layer.k}")
        times, refused = _measure(layer, asked, where, tokens, timer, backends, report)
        results[key_of(asked)] = Result(key_of(asked), times, refused)
    for kind in experts_of(checkpoint, tp_size):
        described = f"{kind.scheme.describe()}, {kind.experts} experts of {kind.n} x {kind.k}"
        report(f"{kind.name} and its like ({kind.count}): {described}")
        result = measure_experts(kind, where, dtype, tokens, timer, expert_backends, report)
        results[result.layer] = result
    return TuningFile(FORMAT, gpu_of(where), versions(), list(tokens), list(results.values()))


def _measure(
    layer: Layer,
    asked: LinearRequest,
    device: torch.device,
    tokens: Sequence[int],
    timer: Timer,
    backends: Sequence[Backend],
    report: Callable[[str], object],
) -> tuple[dict[str, list[float]], dict[str, str]]:
    stored = random_shard(asked.scheme, layer.n, layer.k, asked.dtype, device)
    sample = Sample.of(asked.scheme, stored)

    def measure(backend: Backend) -> list[float]:
        copies = _copies(layer, asked, backend, stored)
        return [_time(copies, sample, m, asked, timer) for m in tokens]

    return measure_backends(backends, asked, measure, report)


@dataclasses.dataclass(frozen=True)
class _Copy:
    """The layer as a server would hold it."""

    product: LinearProduct
    module: torch.nn.Module

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self.product.apply(self.module, x)


def _copies(layer: Layer, asked: LinearRequest, backend: Backend, stored: dict[str, torch.Tensor]) -> list[_Copy]:
    """The layer as ``backend`` keeps it, as often as fills the cache, or is called. Raises ValueError as the check at load does."""

    def make(module: torch.nn.Module) -> _Copy:
        product = LinearProduct(layer.scheme, "tuning", layer.name, asked.math, asked.dtype)
        product.prepare(module, [stored], layer.n, layer.k, backends=[backend])
        return _Copy(product, module)

    return filling_the_cache(make)


def _time(copies: Sequence[_Copy], sample: Sample, m: int, asked: LinearRequest, timer: Timer) -> float:
    """Microseconds of the layer for ``m`` tokens. Raises ValueError when it is wrong for them."""
    device = sample.rows.device
    x = torch.randn(m, asked.k, generator=torch.Generator(device).manual_seed(m), device=device).to(asked.dtype)
    some = ends(m, device)
    expected = sample.outputs(x[some])
    y = copies[0].apply(x)[some][:, sample.rows].double()
    error = float(((y - expected).norm(dim=1) / expected.norm(dim=1)).max())
    if not error < TOLERANCE:
        raise ValueError(f"is wrong: relative error {error:.2g} with {m} tokens")
    return timer(lambda index: copies[index % len(copies)].apply(x))


def merge(path: Path, content: TuningFile) -> TuningFile:
    """``content`` with the layers that the file at ``path`` has besides, if there is one.

    Raises ModelOptExtError when that is no tuning file, or one of another GPU, other versions or other numbers of tokens.
    """
    if not path.exists():
        return content
    before = read(path)
    reason = objection(before, content.gpu)
    if reason is None and before.tokens != content.tokens:
        reason = f"was measured for {before.tokens} tokens, these are {content.tokens}"
    if reason is not None:
        raise ModelOptExtError.at(path, "content", "a file that can be added to", f"one that {reason}")
    measured = {result.layer for result in content.results}
    kept = [result for result in before.results if result.layer not in measured]
    return msgspec.structs.replace(content, results=[*kept, *content.results])
