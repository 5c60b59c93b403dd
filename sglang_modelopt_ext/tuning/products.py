"""Times of given products, unquantized ones among them, for a search over formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import msgspec
import torch

from sglang_modelopt_ext.backends.product import Product
from sglang_modelopt_ext.backends.timings import Result, TuningFile
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.tuning.experts import ExpertKind
from sglang_modelopt_ext.tuning.run import Layer, Timer, measure
from sglang_modelopt_ext.tuning.sample import filling_the_cache
from sglang_modelopt_kernels.timing import median_us

TORCH = "torch"
"""The name of the product of an unquantized layer."""


def tune_products(
    products: Sequence[Product],
    dtype: torch.dtype,
    tokens: Sequence[int],
    *,
    device: str = "cuda",
    timer: Timer = median_us,
    report: Callable[[str], object] = print,
) -> TuningFile:
    """Measure every product with every backend that supports it; unquantized linear layers with torch.

    Args:
        products: each with a key of its own; unquantized experts are not among them.
        dtype: the model's type.
        tokens: the numbers of tokens to measure.
        device: the GPU.
        timer: returns the microseconds of a call.
        report: called with one line for each layer and backend.
    """
    gpu = torch.device(device)
    layers = [Layer(p.scheme, p.n, p.k, p.name) for p in products if p.scheme is not None and not p.experts]
    experts = [
        ExpertKind(p.scheme, p.n, p.k, p.shards, p.experts, p.top_k, p.name)
        for p in products
        if p.scheme is not None and p.experts
    ]
    content = measure(layers, experts, gpu, dtype, tokens=tokens, timer=timer, report=report)
    plain = []
    for product in products:
        if product.scheme is None:
            us = _unquantized(product, dtype, tokens, gpu, timer)
            report(f"{product.name} and its like: unquantized, {product.n} x {product.k}")
            report(f"  {TORCH:24}" + "".join(f"{each:10.1f}" for each in us))
            plain.append(Result(product.key(Device.of(gpu), dtype), {TORCH: us}))
    return msgspec.structs.replace(content, results=[*content.results, *plain])


@dataclasses.dataclass(frozen=True)
class _Copy:
    """One copy of an unquantized weight."""

    module: torch.nn.Module

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.module.get_parameter("weight"))


def _unquantized(
    product: Product, dtype: torch.dtype, tokens: Sequence[int], device: torch.device, timer: Timer
) -> list[float]:
    generator = torch.Generator(device).manual_seed(0)
    weight = (torch.randn(product.n, product.k, generator=generator, device=device) / product.k**0.5).to(dtype)

    def make(module: torch.nn.Module) -> _Copy:
        module.register_parameter("weight", torch.nn.Parameter(weight.clone(), requires_grad=False))
        return _Copy(module)

    copies = filling_the_cache(make)
    times = []
    for m in tokens:
        x = torch.randn(m, product.k, generator=generator, device=device).to(dtype)

        def call(index: int, x: torch.Tensor = x) -> torch.Tensor:
            return copies[index % len(copies)].apply(x)

        times.append(timer(call))
    return times
