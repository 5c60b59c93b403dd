"""Row of the product with 8-bit weights: codes decoded in registers, or multiplied as they are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton

from benchmarks.registry.base import Case, Kernel, Launch, Product, StressCase
from benchmarks.registry.operands import (
    MANY,
    SPLIT,
    TRITON_TYPES,
    WIDTHS,
    N,
    dense_values,
    product_case,
    random_bf16,
    random_fp8,
    random_int8,
    random_scale,
    tokens_for,
)
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.gemm.common import matrix_instruction
from sglang_modelopt_kernels.gemm.common.launch import Plan
from sglang_modelopt_kernels.gemm.w8_decode import (
    ByteWeight,
    eight_bit_linear,
    float_blocks,
    launch,
    mxfp8,
    naive_eight_bit_linear,
    whole,
)
from sglang_modelopt_kernels.gemm.w8_decode.kernel import byte_decode_kernel, eight_bit_kernel
from sglang_modelopt_kernels.gemm.w8_decode.packing import Kind

STORED_TYPES: dict[Kind, tuple[str, str]] = {
    "int8": ("i8", "fp32"),
    "e4m3": ("fp8e4nv", "fp32"),
    "e4m3_float": ("fp8e4nv", "fp32"),
    "e4m3_exponent": ("fp8e4nv", "u8"),
}
"""Triton's types of the codes and of the block scales of each kind."""
FORMATS: dict[Kind, str] = {
    "int8": "int8_per_channel",
    "e4m3": "fp8_per_channel",
    "e4m3_float": "fp8_block",
    "e4m3_exponent": "mxfp8",
}
"""A weight format that is kept as each kind."""


def _compile(arch: int) -> Iterator[Case]:
    """Yield every configuration that the launcher can choose, and the decoding for many tokens."""
    for kind, (codes, scale) in STORED_TYPES.items():
        codes = codes if arch >= 89 else codes.replace("fp8e4nv", "u8")
        numerics = {"KIND": kind, "NATIVE": arch >= 89, "ASM": True}
        for dtype in launch.TAKEN[kind]:
            name, math = TRITON_TYPES[dtype], launch.math_of(kind, dtype)
            operands = {"x_ptr": f"*{name}", "w_ptr": f"*{codes}", "s_ptr": f"*{scale}"}
            own: dict[str, Any] = {"MATH": math, "SCALE_ROWS": 128 if kind == "e4m3_float" else 1}
            own |= {"WGMMA": matrix_instruction(arch) == "wgmma", "PDL": arch >= 90}
            for config in launch.configs(kind, math, arch):
                # Blackwell's tcgen05 has no int8 instruction in Triton: mma.sync multiplies.
                wanted = "small" if math == "i8" else "any"
                label = f"eight_bit {kind} {name}"
                yield product_case(label, eight_bit_kernel, config, operands, numerics | own, wanted)
            if math == "i8":
                continue
            types = {"w_ptr": f"*{codes}", "s_ptr": f"*{scale}", "y_ptr": f"*{name}"}
            types |= dict.fromkeys(("first", "n", "k"), "i32")
            constexprs = numerics | {"F16": math == "f16", "BN": 8, "BK": 512}
            yield Case(f"decode_bytes {kind} {name}", byte_decode_kernel, types, constexprs, {}, ("k",))


def _stress(capability: int) -> Iterator[StressCase]:
    for kind, dtypes in launch.TAKEN.items():
        for dtype in dtypes:
            for width, k in WIDTHS.items():
                if width == "half" or (width == "tail" and kind == "e4m3_float"):
                    continue
                for plan in _plans(kind, dtype, capability, width):
                    way = f"{plan[0]} split {plan[1]}" if plan else "decoded"
                    name = f"eight_bit {kind} {str(dtype).removeprefix('torch.')} {width} {way}"
                    yield StressCase(name, partial(_launch, kind, dtype, k, plan))


def _plans(kind: Kind, dtype: torch.dtype, capability: int, width: str) -> list[Plan | None]:
    """Return every configuration, the smallest one split along K too, and None for the choice by many tokens."""
    known = launch.configs(kind, launch.math_of(kind, dtype), capability)
    plans: list[Plan | None] = [(config, 1) for config in known]
    return [*plans, (known[0], SPLIT), None] if width == "whole" else plans


def _launch(kind: Kind, dtype: torch.dtype, k: int, plan: Plan | None) -> Launch:
    generator = torch.Generator("cuda").manual_seed(k)
    number = WEIGHT_FORMATS[FORMATS[kind]]
    stored = number.quantize(torch.randn(N, k, generator=generator, device="cuda").bfloat16())
    values, weight = dense_values(number.decode(stored)), _kept(kind, stored)
    tokens = tokens_for(*plan) if plan else MANY[-1]
    x = torch.randn(tokens, k, generator=generator, device="cuda").to(torch.float8_e4m3fn).float()
    x = (x * 20).clamp(-128, 127).round().to(dtype) if dtype == torch.int8 else x.to(dtype)
    row_scale = torch.rand(tokens, 1, generator=generator, device="cuda") + 0.5
    expected = (x.double() @ values.T) * row_scale.double()
    if plan is None:
        return Launch(lambda: eight_bit_linear(x, weight, row_scale, None, torch.bfloat16), expected)
    return Launch(lambda: launch.run(x, weight, row_scale, None, torch.bfloat16, plan), expected)


def _kept(kind: Kind, stored: dict[str, torch.Tensor]) -> ByteWeight:
    codes, scale = stored["weight"], stored["weight_scale"]
    if kind == "e4m3_float":
        return float_blocks([(codes, scale.squeeze(3).squeeze(1))])
    if kind == "e4m3_exponent":
        return mxfp8(codes, scale)
    return whole(codes, scale.float().reshape(-1).expand(codes.shape[0]).contiguous())


def _weight(kind: str, n: int, k: int) -> dict[str, Any]:
    """Make a random weight."""
    out_scale = torch.rand(n, device="cuda") + 0.5
    if kind == "int8":
        weight = whole(random_int8(n, k), out_scale)
    elif kind == "mxfp8":
        weight = mxfp8(random_fp8(n, k), random_scale("mxfp4", n, k))
    else:
        scale = torch.rand(triton.cdiv(n, 128), triton.cdiv(k, 128), device="cuda") + 0.5
        weight = float_blocks([(random_fp8(n, k), scale)])
    return {"weight": weight, "codes": weight.codes, "scale": out_scale if weight.scale is None else weight.scale}


def _product(kind: str, activations: Any) -> Product:
    return Product(
        lambda _: True,
        partial(_weight, kind),
        activations,
        lambda x, weight, out_dtype: eight_bit_linear(x, weight["weight"], out_dtype=out_dtype),
        lambda x, weight: naive_eight_bit_linear(x, weight["weight"]),
        rows=1032,
    )


W8_DECODE = Kernel(
    "eight_bit",
    "gemm/w8_decode",
    naive_eight_bit_linear,
    compile=_compile,
    stress=_stress,
    measured={
        "int8 x int8": _product("int8", random_int8),
        "int8 x bf16": _product("int8", random_bf16),
        "fp8_pb x bf16": _product("fp8_block", random_bf16),
        "mxfp8 x bf16": _product("mxfp8", random_bf16),
    },
)
