"""The measurement of every backend that supports a product of a mixture's experts, on the GPU at hand.

Random tokens are routed to random experts, each token to ``top_k`` different ones. One product is timed, gate and up together or
down, with the sorting of rows and the rounding of activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from sglang_modelopt_ext.backends.experts.base import ExpertBackend, ExpertRequest, Routing
from sglang_modelopt_ext.backends.timings import Result, key_of
from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME
from sglang_modelopt_ext.checkpoint.reader import Checkpoint
from sglang_modelopt_ext.checkpoint.tensors import read_json_object
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.layers.experts import ExpertProduct
from sglang_modelopt_ext.schemes.base import UNQUANTIZED, LayerScheme
from sglang_modelopt_ext.schemes.table import math_of
from sglang_modelopt_ext.tuning.sample import (
    TOLERANCE,
    Sample,
    ends,
    filling_the_cache,
    measure_backends,
    random_shard,
)

DIFFERENT = 4
"""The number of different random experts; the others are copies of these, and take equal time."""
ROUTINGS = 8
"""The number of different routings, used in turn."""


@dataclasses.dataclass(frozen=True)
class ExpertKind:
    """One kind of product of a checkpoint's experts on one rank, and the number of layers that have it.

    Attributes:
        scheme: the quantization of the weights.
        n, k: output and input features of a rank's part of one expert, its shards together.
        shards: 2 for gate and up, 1 for down, and for up without a gate.
        experts, top_k: the number of experts, and of experts for each token.
        name: the name of the first such layer, with ``gate_up`` or ``down``.
        count: the number of layers with this kind of product.
    """

    scheme: LayerScheme
    n: int
    k: int
    shards: int
    experts: int
    top_k: int
    name: str
    count: int = 1

    def product(self, dtype: torch.dtype) -> ExpertProduct:
        """Return the product that a server would build."""
        return ExpertProduct(self.scheme, "tuning", self.name, math_of(self.scheme), dtype)

    def request(self, device: torch.device, dtype: torch.dtype) -> ExpertRequest:
        """Return the request by which a server would select a backend."""
        return self.product(dtype).request(device, self.n, self.k, self.experts, self.top_k)


def experts_of(checkpoint: Checkpoint, tp_size: int = 1) -> list[ExpertKind]:
    """Return the kinds of products of one rank's experts, in the order of the checkpoint.

    Raises:
        ModelOptExtError: ``tp_size`` does not divide an expert, or config.json does not state the number of experts per token.
    """
    if not checkpoint.experts:
        return []
    kinds: dict[ExpertKind, ExpertKind] = {}
    top_k = read_json_object(checkpoint.folder / CONFIG_NAME).get("num_experts_per_tok")
    for layer in checkpoint.experts.values():
        inner, rest = divmod(layer.intermediate, tp_size)
        if rest:
            expected = f"a divisor of the {layer.intermediate} inner features of {layer.name}"
            raise ModelOptExtError.at("command line", "--tp-size", expected, tp_size)
        if not isinstance(top_k, int) or not 0 < top_k <= layer.count:
            where = checkpoint.folder / CONFIG_NAME
            raise ModelOptExtError.at(where, "num_experts_per_tok", f"a number from 1 to {layer.count}", top_k)
        parts, first = (2, "gate_up") if layer.gated else (1, "up")
        products = (
            (layer.gate_up, parts * inner, layer.hidden, parts, first),
            (layer.down, layer.hidden, inner, 1, "down"),
        )
        for kind in (
            ExpertKind(one.scheme, n, k, shards, one.count(layer.count), top_k, f"{layer.name}.{name}")
            for sets, n, k, shards, name in products
            for one in sets
            if one.scheme != UNQUANTIZED
        ):
            alike = dataclasses.replace(kind, name="")
            found = kinds.get(alike)
            kinds[alike] = kind if found is None else dataclasses.replace(found, count=found.count + 1)
    return list(kinds.values())


def measure_experts(
    kind: ExpertKind,
    device: torch.device,
    dtype: torch.dtype,
    tokens: Sequence[int],
    timer: Callable[[Callable[[int], object]], float],
    backends: Sequence[ExpertBackend],
    report: Callable[[str], object],
) -> Result:
    """Measure one kind of product with every backend that supports it.

    Args:
        kind: the product.
        device: the GPU.
        dtype: the model's type.
        tokens: the numbers of tokens to measure.
        timer: returns the microseconds of ``call(index)`` for a call that takes the number of its repetition.
        backends: the candidates.
        report: called with one line for each backend.
    """
    request = kind.request(device, dtype)
    rows = kind.n // kind.shards
    stored = [
        [
            random_shard(request.scheme, rows, kind.k, dtype, device, seed=DIFFERENT * shard + expert)
            for shard in range(kind.shards)
        ]
        for expert in range(min(DIFFERENT, kind.experts))
    ]
    samples = [[Sample.of(request.scheme, shard) for shard in shards] for shards in stored]

    def measure(backend: ExpertBackend) -> list[float]:
        copies = _copies(kind, backend, stored, dtype)
        return [_time(kind, copies, samples, m, device, dtype, timer) for m in tokens]

    times, rejected = measure_backends(backends, request, measure, report)
    return Result(key_of(request), times, rejected)


@dataclasses.dataclass(frozen=True)
class _Copy:
    """One copy of the prepared experts, on a module as in a server."""

    product: ExpertProduct
    module: torch.nn.Module


def _copies(
    kind: ExpertKind, backend: ExpertBackend, stored: list[list[dict[str, torch.Tensor]]], dtype: torch.dtype
) -> list[_Copy]:
    """Return prepared copies of the experts that together fill the GPU's cache, or one for each repetition if these are fewer.

    Raises:
        ValueError: the backend fails its check before serving.
    """
    experts = [stored[expert % len(stored)] for expert in range(kind.experts)]

    def make(module: torch.nn.Module) -> _Copy:
        product = kind.product(dtype)
        product.prepare(module, "tuned", experts, kind.n, kind.k, kind.top_k, backends=[backend])
        return _Copy(product, module)

    return filling_the_cache(make)


def _time(
    kind: ExpertKind,
    copies: Sequence[_Copy],
    samples: Sequence[Sequence[Sample]],
    m: int,
    device: torch.device,
    dtype: torch.dtype,
    timer: Callable[[Callable[[int], object]], float],
) -> float:
    """Return the microseconds of the product for ``m`` tokens. Raises ValueError when its result is wrong against float64."""
    generator = torch.Generator(device).manual_seed(m)
    x = torch.randn(m, kind.k, generator=generator, device=device).to(dtype)
    chosen = [
        torch.rand(m, kind.experts, generator=generator, device=device)
        .topk(kind.top_k)
        .indices.flatten()
        .to(torch.int32)
        for _ in range(ROUTINGS)
    ]

    def apply(index: int) -> torch.Tensor:
        copy = copies[index % len(copies)]
        return copy.product.apply(copy.module, x, Routing(chosen[index % ROUTINGS], kind.top_k), dtype)

    y = apply(0)
    for row in ends(chosen[0].shape[0], device).tolist():
        expert = int(chosen[0][row]) % len(samples)
        for part, sample in enumerate(samples[expert]):
            found = y[row, sample.rows + part * (kind.n // kind.shards)].double()
            expected = sample.outputs(x[row // kind.top_k].unsqueeze(0))[0]
            error = float((found - expected).norm() / expected.norm())
            if not error < TOLERANCE:
                raise ValueError(f"is wrong: relative error {error:.2g} with {m} tokens")
    return timer(apply)
