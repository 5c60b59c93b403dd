"""Rows of what the products share: the sum of split-K partials, the planes of E2M1, and the FP8 product of torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.registry.base import Case, Kernel, Launch, StressCase
from benchmarks.registry.operands import N, activation_types, stress_activations
from sglang_modelopt_kernels.formats.fp4_packing.naive import naive_planes
from sglang_modelopt_kernels.gemm.common import naive_finish
from sglang_modelopt_kernels.gemm.common.kernel import finish_kernel
from sglang_modelopt_kernels.gemm.fp8 import fp8_linear, naive_fp8_linear
from sglang_modelopt_kernels.gemm.plane_order import naive_order, order
from sglang_modelopt_kernels.gemm.plane_order.kernel import order_kernel
from sglang_modelopt_kernels.gemm.plane_order.order import BLOCK


def _finish_cases(arch: int) -> Iterator[Case]:
    del arch
    floats = ("partial_ptr", "row_scale_ptr", "out_scale_ptr")
    types = dict.fromkeys(floats, "*fp32") | {"bias_ptr": "*bf16", "y_ptr": "*bf16"}
    types |= dict.fromkeys(("m", "n", "y_stride", "row_step"), "i32")
    for splits in (1, 16):
        constexprs = {"DESCALE": 1.0, "HAS_ROW_SCALE": True, "HAS_BIAS": True, "SPLITS": splits, "BN": 1024}
        yield Case(f"finish {splits} splits", finish_kernel, types, constexprs, {}, ("n", "y_stride"))


def _order_cases(arch: int) -> Iterator[Case]:
    for dtype in activation_types(arch):
        types = {"x_ptr": f"*{dtype}", "y_ptr": "*bf16" if dtype == "bf16" else "*fp16", "k": "i32"}
        yield Case(f"order {dtype}", order_kernel, types, {"PDL": arch >= 90, "BLOCK": BLOCK}, {}, ("k",))


def _order_stress(capability: int) -> Iterator[StressCase]:
    if capability >= 89:
        yield StressCase("order fp8", _order)


def _order() -> Launch:
    x, _ = stress_activations(2048, 4096, "fp8")
    return Launch(lambda: order(x, torch.float16), naive_order(x, torch.float64))


def _fp8_stress(capability: int) -> Iterator[StressCase]:
    if capability >= 89:
        for tokens in (1, 64, 2048):
            yield StressCase(f"fp8_linear {tokens} tokens", partial(_fp8, tokens, False))
            yield StressCase(f"fp8_linear {tokens} tokens, one scale", partial(_fp8, tokens, True))


def _fp8(tokens: int, uniform: bool) -> Launch:
    generator = torch.Generator("cuda").manual_seed(tokens)
    unit = torch.randn(N, 4096, generator=generator, device="cuda").to(torch.float8_e4m3fn)
    out_scale = torch.rand(N, generator=generator, device="cuda") + 0.5
    x, row_scale = stress_activations(tokens, 4096, "fp8")
    if uniform:
        out_scale, row_scale = out_scale[:1].expand(N).contiguous(), row_scale[:1]
    expected = naive_fp8_linear(x, row_scale, unit, out_scale)
    return Launch(lambda: fp8_linear(x, row_scale, unit, out_scale, None, torch.bfloat16, uniform), expected)


FINISH = Kernel(
    "finish",
    "gemm/common",
    naive_finish,
    compile=_finish_cases,
    without={"stress": "the dense products of gemm/w4_decode and gemm/w8_decode launch it"},
)
ORDER = Kernel("order", "gemm/plane_order", naive_order, compile=_order_cases, stress=_order_stress)
PLANES = Kernel(
    "fp4_planes",
    "formats/fp4_packing",
    naive_planes,
    without={
        "compile": "functions that kernels of gemm, moe and attention inline; it has no kernel",
        "stress": "functions that kernels of gemm, moe and attention inline; it has no kernel",
    },
)
FP8 = Kernel(
    "fp8_linear",
    "gemm/fp8",
    naive_fp8_linear,
    stress=_fp8_stress,
    without={"compile": "torch._scaled_mm: its kernels are torch's"},
)
