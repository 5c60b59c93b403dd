"""Random layers as a checkpoint stores them, and what some of their outputs are in float64: what tuning checks kernels by."""

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
"""Tokens and outputs at either end that are compared with float64 on the layer's own sizes."""
TOLERANCE = 2.0**-6
"""Relative, over a token's compared outputs: bf16 rounds them, and the activations, at most twice each."""

Copy = TypeVar("Copy")


class Named(Protocol):
    """A backend, of linear layers or of experts."""

    name: str

    def supports(self, request: Any, /) -> str | None: ...


def measure_backends(
    backends: Iterable[Named], request: Any, measure: Callable[[Any], list[float]], report: Callable[[str], object]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """What ``measure`` says of every backend that takes ``request``, and its ValueError for those that are refused."""
    times: dict[str, list[float]] = {}
    refused: dict[str, str] = {}
    for backend in backends:
        if backend.supports(request) is not None:
            continue
        try:
            times[backend.name] = measure(backend)
            report(f"  {backend.name:24}" + "".join(f"{us:10.1f}" for us in times[backend.name]))
        except ValueError as error:  # a backend that errs, or does not run, here
            refused[backend.name] = str(error)
            report(f"  {backend.name:24} {error}")
    return times, refused


def filling_the_cache(make: Callable[[torch.nn.Module], Copy]) -> list[Copy]:
    """What ``make`` prepares on a module, as often as fills a GPU's cache, or is called; once elsewhere."""
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
    """What a checkpoint would store for a random layer, on ``device``; activations of about unit size fit its scales."""
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
    """Some outputs of the layer in float64: the weight's rows at either end, and what goes into it."""

    scheme: LayerScheme
    rows: torch.Tensor
    weight: DecodedWeight
    inputs: dict[str, torch.Tensor]

    @classmethod
    def of(cls, scheme: LayerScheme, stored: dict[str, torch.Tensor]) -> Sample:
        whole = scheme.weight.decode(stored)
        rows = ends(whole.unit.shape[0], whole.unit.device)
        scale = whole.out_scale if whole.out_scale.dim() == 0 else whole.out_scale[rows]
        inputs = {name: t for name, t in stored.items() if name in (INPUT_SCALE, PRE_QUANT_SCALE.name, LORA_A, LORA_B)}
        return cls(scheme, rows, DecodedWeight(whole.unit[rows].clone(), scale), inputs)

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Float64 ``[M, rows]`` for ``x`` ``[M, K]``."""
        wide = x.to(torch.float32)
        if PRE_QUANT_SCALE.name in self.inputs:
            wide = wide * self.inputs[PRE_QUANT_SCALE.name].to(torch.float32)
        y = naive_linear(wide, self.weight, self.scheme.activation, self.inputs.get(INPUT_SCALE))
        if self.scheme.low_rank:
            y += wide.double() @ self.inputs[LORA_A].double().T @ self.inputs[LORA_B][self.rows].double().T
        return y


def ends(size: int, device: torch.device) -> torch.Tensor:
    """Up to CHECKED indices at either end of ``size``."""
    last = torch.arange(max(size - CHECKED, CHECKED), max(size, CHECKED), device=device)
    return torch.cat([torch.arange(min(CHECKED, size), device=device), last[last < size]])
