"""Gate and up with SwiGLU and rounding to static FP8, as chains of launches: the second table of :mod:`benchmarks.gemm`.

Each chain starts at activations that are rounded already and ends at the E4M3 values that the down projection multiplies, so that
what one kernel fuses and another does not is compared as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.registry import measured
from benchmarks.registry.base import Product
from benchmarks.registry.operands import random_fp8
from benchmarks.registry.peers_sglang import INPUT_SCALE, STOCK, bmm
from sglang_modelopt_kernels.gemm.fp8 import fp8_linear
from sglang_modelopt_kernels.quantize.gated import swiglu_fp8

TOLERANCE = 2.0**-4
"""Relative error of an output row: half a step of E4M3's three mantissa bits. What else is rounded is rounded to bf16."""
DUAL_TOKENS = 16
"""``MAX_DUAL_GEMM_DECODE_TOKENS`` of SGLang's dual GEMM."""


@dataclass(frozen=True)
class Gated:
    """A chain of launches with random operands.

    Attributes:
        supports: whether it runs on a compute capability (times ten).
        weight: makes a random weight ``(n, k)``, the gate's rows above up's: "codes" and "scale" among its tensors.
        run: computes the E4M3 values ``[M, N / 2]`` of ``(activations, weight, scale)``; the scale is the result's, fp32 ``[]``.
        naive: computes gate and up in float64, ``[M, N]``.
        includes: the launches, for the table.
        rows: N of the problem it is checked on.
        most_tokens: the largest number of tokens that it takes; None for no limit.
    """

    supports: Callable[[int], bool]
    weight: Callable[[int, int], Mapping[str, Any]]
    run: Callable[[torch.Tensor, Mapping[str, Any], torch.Tensor], torch.Tensor]
    naive: Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor]
    includes: str
    rows: int
    most_tokens: int | None = None


def naive_gated(h: torch.Tensor) -> torch.Tensor:
    """Compute ``silu(gate) * up`` for ``h = [gate, up]`` in float64."""
    gate, up = h.double().chunk(2, dim=1)
    return gate / (1 + torch.exp(-gate)) * up


def _run_ours(product: Product, x: torch.Tensor, weight: Mapping[str, Any], scale: torch.Tensor) -> torch.Tensor:
    return swiglu_fp8(product.run(x, weight, torch.bfloat16), None, scale)[1]


def _ours(product: Product) -> Gated:
    """Make the chain of a product of this package with FP8 activations."""
    includes = "product | SwiGLU + rounding"
    return Gated(product.supports, product.weight, partial(_run_ours, product), product.naive, includes, product.rows)


def _run_fp8(x: torch.Tensor, weight: Mapping[str, Any], scale: torch.Tensor) -> torch.Tensor:
    h = fp8_linear(x, weight["input_scale"], weight["codes"], weight["columns"], None, torch.bfloat16, True)
    return swiglu_fp8(h, None, scale)[1]


def _fp8_weight(n: int, k: int) -> dict[str, Any]:
    """Make a random FP8 weight whose products are about 1, where SwiGLU is neither 0 nor linear."""
    scale = torch.full((), 1 / (INPUT_SCALE * k**0.5), device="cuda")
    return {**STOCK["stock fp8"].weight(n, k), "scale": scale, "columns": scale.expand(n).contiguous()}


def _run_stock(x: torch.Tensor, weight: Mapping[str, Any], scale: torch.Tensor) -> torch.Tensor:
    """Launch what SGLang's Llama launches from gate and up to the product of down."""
    from sglang.kernels.ops.quantization.fp8_kernel import static_quant_fp8
    from sglang.srt.layers.activation import silu_and_mul

    values: torch.Tensor = static_quant_fp8(silu_and_mul(bmm(x, weight)), scale, repeat_scale=False)[0]
    return values


def _run_dual(x: torch.Tensor, weight: Mapping[str, Any], scale: torch.Tensor) -> torch.Tensor:
    """Call SGLang's dual GEMM as ``DualGemm`` does for static scales."""
    from sglang.kernels.ops.gemm import dual_gemm_swiglu_fp8
    from sglang.kernels.ops.gemm.cutedsl_dual_gemm import DualGemmQuantMode

    values: torch.Tensor = dual_gemm_swiglu_fp8(
        x,
        weight["codes"],
        weight["input_scale"],
        weight["scale"],
        scale,
        quant_mode=DualGemmQuantMode.STATIC_PER_TENSOR,
    )[0]
    return values


def _naive_stock(x: torch.Tensor, weight: Mapping[str, Any]) -> torch.Tensor:
    return STOCK["stock fp8"].naive(x, weight)


GATED = {name: _ours(product) for name, product in measured(Product).items() if product.activations is random_fp8} | {
    "fp8": Gated(
        lambda capability: capability >= 89, _fp8_weight, _run_fp8, _naive_stock, "product | SwiGLU + rounding", 1040
    ),
    "stock fp8": Gated(
        STOCK["stock fp8"].supports,
        _fp8_weight,
        _run_stock,
        _naive_stock,
        "product | SwiGLU | rounding",
        1040,
    ),
    "stock dual gemm": Gated(
        lambda capability: capability in (100, 103),
        _fp8_weight,
        _run_dual,
        _naive_stock,
        "product + SwiGLU + rounding",
        1280,
        DUAL_TOKENS,
    ),
}
"""By name. SGLang calls its dual GEMM on SM100 and SM103 alone, and for checkpoints of ``fp8`` and compressed-tensors only:
``DualGemm`` does not know ``ModelOptFp8LinearMethod``."""
