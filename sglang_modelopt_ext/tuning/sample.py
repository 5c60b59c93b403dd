"""Random layers in a checkpoint's formats, and some of their outputs in float64, against which tuning checks backends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch

from sglang_modelopt_ext.layers.linear import INPUT_SCALE
from sglang_modelopt_ext.schemes.base import LORA_A, LORA_B, PRE_QUANT_SCALE, LayerScheme
from sglang_modelopt_kernels.formats.base import DecodedWeight
from sglang_modelopt_kernels.gemm.reference import naive_linear
from sglang_modelopt_kernels.timing import COLD_BYTES, LAUNCHES

CHECKED = 16
"""The number of tokens, and of output features, at either end of M and N that are compared with float64."""
TOLERANCE = 2.0**-6
"""The largest relative error over a token's compared outputs: bf16 rounds these, and the activations, at most twice each."""

Copy = TypeVar("Copy")


class Named(Protocol):
    """A backend of linear layers or of experts: a name, and a test whether it supports a request."""

    name: str

    def supports(self, request: Any, /) -> str | None: ...


def measure_backends(
    backends: Iterable[Named], request: Any, measure: Callable[[Any], list[float]], report: Callable[[str], object]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Measure every backend that supports ``request``.

    Args:
        backends: the candidates.
        request: the layer, or product of experts.
        measure: returns a backend's microseconds by number of tokens, or raises ValueError.
        report: called with one line for each backend.

    Returns:
        ``(times, rejected)``: by name of the backend, the microseconds, and the message of the ValueError.
    """
    times: dict[str, list[float]] = {}
    rejected: dict[str, str] = {}
    for backend in backends:
        if backend.supports(request) is not None:
            continue
        try:
            times[backend.name] = measure(backend)
            report(f"  {backend.name:24}" + "".join(f"{us:10.1f}" for us in times[backend.name]))
        except ValueError as error:  # the backend is wrong on this GPU, or does not run
            rejected[backend.name] = str(error)
            report(f"  {backend.name:24} {error}")
    return times, rejected


def filling_the_cache(make: Callable[[torch.nn.Module], Copy]) -> list[Copy]:
    """Return results of ``make`` on modules of their own, so many that their weights together exceed the GPU's cache.

    There are at most as many as repetitions of a measurement (:data:`LAUNCHES`), and one on a CPU. Used in turn, they are read from
    memory as in a model, not from the cache.
    """
    copies: list[Copy] = []
    wanted = 1
    while len(copies) < wanted:
        module = torch.nn.Module()
        copies.append(make(module))
        kept = list(module.parameters())
        if kept[0].is_cuda:
            wanted = min(COLD_BYTES // sum(p.numel() * p.element_size() for p in kept) + 2, LAUNCHES)
    return copies


def random_shard(
    scheme: LayerScheme, n: int, k: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return the tensors of a random layer by spec name, on ``device``; its scales are for activations of about unit size."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(n, k, generator=generator, device=device) / k**0.5
    stored = scheme.weight.quantize(weight.to(torch.bfloat16))
    if scheme.activation is not None:
        for spec in scheme.activation.tensors:
            stored[spec.name] = torch.full((), 4.0 / (scheme.activation.calibrated_range or 1.0), device=device)
    if scheme.smoothing:
        stored[PRE_QUANT_SCALE.name] = (torch.rand(k, generator=generator, device=device) + 0.5).to(dtype)
    if scheme.low_rank:
        factors = {LORA_A: (scheme.low_rank, k), LORA_B: (n, scheme.low_rank)}
        for name, shape in factors.items():
            stored[name] = (torch.randn(shape, generator=generator, device=device) / shape[1] ** 0.5).to(dtype)
    return stored


@dataclasses.dataclass(frozen=True)
class Sample:
    """Rows of a layer's decoded weight from which some outputs are computed in float64.

    Attributes:
        scheme: the layer's quantization.
        rows: the indices along N, at either end.
        weight: these rows, decoded.
        inputs: the stored tensors that apply to the layer's input, and the low-rank factors, by spec name.
    """

    scheme: LayerScheme
    rows: torch.Tensor
    weight: DecodedWeight
    inputs: dict[str, torch.Tensor]

    @classmethod
    def of(cls, scheme: LayerScheme, stored: dict[str, torch.Tensor]) -> Sample:
        """Decode the rows of a layer with the tensors ``stored``, by spec name."""
        whole = scheme.weight.decode(stored)
        rows = ends(whole.unit.shape[0], whole.unit.device)
        scale = whole.out_scale if whole.out_scale.dim() == 0 else whole.out_scale[rows]
        inputs = {name: t for name, t in stored.items() if name in (INPUT_SCALE, PRE_QUANT_SCALE.name, LORA_A, LORA_B)}
        return cls(scheme, rows, DecodedWeight(whole.unit[rows].clone(), scale), inputs)

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs in float64, ``[M, len(rows)]``, for ``x`` ``[M, K]``."""
        fp32 = x.to(torch.float32)
        if PRE_QUANT_SCALE.name in self.inputs:
            fp32 = fp32 * self.inputs[PRE_QUANT_SCALE.name].to(torch.float32)
        y = naive_linear(fp32, self.weight, self.scheme.activation, self.inputs.get(INPUT_SCALE))
        if self.scheme.low_rank:
            y += fp32.double() @ self.inputs[LORA_A].double().T @ self.inputs[LORA_B][self.rows].double().T
        return y


def ends(size: int, device: torch.device) -> torch.Tensor:
    """Return up to :data:`CHECKED` indices at either end of ``range(size)``, without repetition."""
    last = torch.arange(max(size - CHECKED, CHECKED), max(size, CHECKED), device=device)
    return torch.cat([torch.arange(min(CHECKED, size), device=device), last[last < size]])
