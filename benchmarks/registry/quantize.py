"""Rows of the rounding of activations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.registry.base import Case, Kernel, Launch, Rounding, StressCase
from sglang_modelopt_kernels.formats import e4m3
from sglang_modelopt_kernels.quantize.blocks import (
    BLOCK_ACTIVATIONS,
    naive_quantize_blocks,
    quantize_blocks,
    round_blocks,
)
from sglang_modelopt_kernels.quantize.blocks.kernel import quantize_blocks_kernel
from sglang_modelopt_kernels.quantize.blocks.quantize import PROGRAM_VALUES, numerics
from sglang_modelopt_kernels.quantize.fp8 import naive_quantize_fp8, quantize_fp8
from sglang_modelopt_kernels.quantize.fp8.kernel import (
    quantize_given_kernel,
    quantize_static_kernel,
    quantize_token_kernel,
)
from sglang_modelopt_kernels.quantize.fp8.quantize import BLOCK, WHOLE, token_block
from sglang_modelopt_kernels.quantize.gated import naive_swiglu_fp8, swiglu_fp8
from sglang_modelopt_kernels.quantize.gated.gated import BLOCK as PART
from sglang_modelopt_kernels.quantize.gated.kernel import swiglu_fp8_kernel
from sglang_modelopt_kernels.quantize.int8 import naive_quantize_int8, quantize_int8
from sglang_modelopt_kernels.quantize.int8.kernel import OPTIONS, quantize_int8_kernel
from sglang_modelopt_kernels.quantize.rms_norm import naive_rms_norm_fp8, rms_norm_fp8
from sglang_modelopt_kernels.quantize.rms_norm.kernel import rms_norm_fp8_kernel


def _blocks_cases(arch: int) -> Iterator[Case]:
    """Yield rounding under block scales to codes, their scales in rows and swizzled, and to values."""
    del arch
    for name in BLOCK_ACTIVATIONS:
        group, element = numerics(name)
        for values, swizzle in ((False, False), (False, True), (True, False)):
            types = dict.fromkeys(("x_ptr", "smoothing_ptr"), "*bf16")
            types |= {"input_scale_ptr": "*fp32", "scale_ptr": "*u8", "y_ptr": "*bf16" if values else "*u8"}
            types |= dict.fromkeys(("k", "stride", "scale_columns"), "i32")
            constexprs = {"GROUP": group, "ELEMENT": element, "SMOOTH": True, "VALUES": values, "SWIZZLE": swizzle}
            constexprs["BLOCKS"] = PROGRAM_VALUES // group
            label = "values" if values else "codes, scales swizzled" if swizzle else "codes"
            case = f"quantize_blocks {name} {label}"
            yield Case(case, quantize_blocks_kernel, types, constexprs, {}, ("k", "stride", "scale_columns"))


def _types(out: str) -> dict[str, str]:
    types = dict.fromkeys(("x_ptr", "smoothing_ptr"), "*bf16") | {"scale_ptr": "*fp32", "y_ptr": f"*{out}"}
    return types | dict.fromkeys(("k", "stride"), "i32")


def _fp8_cases(arch: int) -> Iterator[Case]:
    types = _types("fp16" if arch < 89 else "fp8e4nv")
    constexprs: dict[str, Any] = {"SMOOTH": True, "CAST": arch >= 89, "PDL": arch >= 90}
    static = constexprs | {"BLOCK": BLOCK}
    yield Case("quantize_fp8 static", quantize_static_kernel, types, static, {}, ("k", "stride"))
    for k in (4096, WHOLE, 2 * WHOLE):
        own, options = _of_token(k)
        own |= constexprs | {"WHOLE": k <= WHOLE}
        yield Case(f"quantize_fp8 token {k}", quantize_token_kernel, types, own, options, ("k", "stride"))
    given = types | {"amax_ptr": "*fp32", "parts": "i32"}
    for parts in (1, 16):
        own = static | {"PARTS": parts}
        yield Case(f"quantize_fp8 given {parts}", quantize_given_kernel, given, own, {}, ("k", "stride"))


def _of_token(k: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the block of a token of ``k`` values, and its warps."""
    block = token_block(k)
    return {"BLOCK": block["BLOCK"]}, {"num_warps": block["num_warps"]}


def _fused_types(arch: int, inputs: tuple[str, ...]) -> dict[str, str]:
    types = dict.fromkeys((*inputs, "smoothing_ptr"), "*bf16") | dict.fromkeys(("static_ptr", "scale_ptr"), "*fp32")
    return types | {"y_ptr": "*fp16" if arch < 89 else "*fp8e4nv", "k": "i32", "stride": "i32"}


def _rms_norm_cases(arch: int) -> Iterator[Case]:
    types = _fused_types(arch, ("x_ptr", "residual_ptr", "weight_ptr", "normed_ptr"))
    types |= {"residual_stride": "i32", "eps": "fp32"}
    for k in (4096, WHOLE):
        for static in (False, True):
            own, options = _of_token(k)
            own |= {"HAS_RESIDUAL": True, "SMOOTH": True, "STATIC": static, "CAST": arch >= 89, "PDL": arch >= 90}
            aligned = ("k", "stride", "residual_stride")
            name = f"rms_norm_fp8 {'static' if static else 'token'} {k}"
            yield Case(name, rms_norm_fp8_kernel, types, own, options, aligned)


def _gated_cases(arch: int) -> Iterator[Case]:
    types = _fused_types(arch, ("h_ptr", "gated_ptr")) | {"amax_ptr": "*fp32"}
    numerics = {"SMOOTH": True, "CAST": arch >= 89, "PDL": arch >= 90, "BLOCK": PART}
    for way in ("static", "token", "parts"):
        own = numerics | {"STATIC": way == "static", "WHOLE": way == "token"}
        yield Case(f"swiglu_fp8 {way}", swiglu_fp8_kernel, types, own, {"num_warps": 4}, ("k", "stride"))


def _int8_cases(arch: int) -> Iterator[Case]:
    del arch
    types = _types("i8") | {"row_scale_ptr": "*fp32"}
    yield Case("quantize_int8", quantize_int8_kernel, types, {"SMOOTH": True, "BLOCK": 2048}, OPTIONS, ("k", "stride"))


def _fp8_stress(capability: int) -> Iterator[StressCase]:
    del capability
    for smoothing in (False, True):
        for way in ("static", "token"):
            name = f"quantize_fp8 {way}{' smoothed' if smoothing else ''}"
            yield StressCase(name, partial(_launch_fp8, way, smoothing))


def _rms_norm_stress(capability: int) -> Iterator[StressCase]:
    del capability
    for way in ("static", "token"):
        yield StressCase(f"rms_norm_fp8 {way}", partial(_launch_rms_norm, way))


def _gated_stress(capability: int) -> Iterator[StressCase]:
    del capability
    for way in ("static", "token", "parts"):
        yield StressCase(f"swiglu_fp8 {way}", partial(_launch_gated, way))


def _bytes(first: torch.Tensor, values: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """Return all outputs of a fused rounding as bytes, a row for each token."""
    scale_bytes = row_scale.expand(first.shape[0], 1).contiguous().view(torch.uint8)
    return torch.cat([first.view(torch.uint8), values.view(torch.uint8), scale_bytes], dim=1)


def _launch_rms_norm(way: str) -> Launch:
    x, residual, weight = _random(2048, 4096), _random(2049, 4096)[1:], _random(1, 4096)[0]
    scale = torch.tensor(0.01, device="cuda") if way == "static" else None
    # The kernel replaces both inputs.
    return Launch(lambda: _bytes(*rms_norm_fp8(x.clone(), weight, 1e-5, residual.clone(), None, scale)), None)


def _launch_gated(way: str) -> Launch:
    h = _random(2048, 2 * PART if way == "token" else 8192)
    scale = torch.tensor(0.01, device="cuda") if way == "static" else None
    return Launch(lambda: _bytes(*swiglu_fp8(h, None, scale)), None)


def _blocks_stress(capability: int) -> Iterator[StressCase]:
    del capability
    for activation in BLOCK_ACTIVATIONS:
        yield StressCase(f"quantize_blocks {activation} codes", partial(_launch_blocks, activation, False))
        yield StressCase(f"quantize_blocks {activation} values", partial(_launch_blocks, activation, True))


def _int8_stress(capability: int) -> Iterator[StressCase]:
    del capability
    for smoothing in (False, True):
        yield StressCase(f"quantize_int8 static{' smoothed' if smoothing else ''}", partial(_launch_int8, smoothing))


def _launch_int8(smoothed: bool) -> Launch:
    x = _random(2048, 8192)
    smoothing = torch.rand(8192, generator=torch.Generator("cuda").manual_seed(0), device="cuda") + 0.5
    scale = torch.tensor(0.01, device="cuda")

    def call() -> torch.Tensor:
        values, row_scale = quantize_int8(x, smoothing if smoothed else None, scale)
        return torch.cat([values.view(torch.uint8), row_scale.view(torch.uint8)], dim=1)

    return Launch(call, None)


def _random(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(columns)
    return torch.randn(rows, columns, generator=generator, device="cuda").bfloat16()


def _launch_fp8(way: str, smoothing: bool) -> Launch:
    x = _random(2048, 5000)
    smooth = _random(1, 5000)[0].abs() + 0.5 if smoothing else None
    scale = torch.tensor(0.01, device="cuda") if way == "static" else None

    def call() -> torch.Tensor:
        values, row_scale = quantize_fp8(x, smooth, scale)
        scale_bytes = row_scale.expand(x.shape[0], 1).contiguous().view(torch.uint8)
        return torch.cat([values.view(torch.uint8), scale_bytes], dim=1)

    return Launch(call, None)


def _launch_blocks(activation: str, values: bool) -> Launch:
    x, scale = _random(2048, 4096), torch.tensor(0.01, device="cuda") if activation.startswith("nvfp4") else None

    def call() -> torch.Tensor:
        if values:
            return round_blocks(x, activation, None, scale, torch.bfloat16)[0]
        rounded = quantize_blocks(x, activation, None, scale, False)
        return torch.cat([rounded.codes.view(torch.uint8), rounded.scale.view(torch.uint8)], dim=1)

    return Launch(call, None)


def _run_fp8(x: torch.Tensor, smoothing: torch.Tensor, scale: torch.Tensor | None) -> Any:
    return quantize_fp8(x, smoothing, scale)


def _run_blocks(activation: str, x: torch.Tensor, smoothing: torch.Tensor, scale: torch.Tensor | None) -> Any:
    return quantize_blocks(x, activation, smoothing, scale)


def _block_bytes(activation: str, m: int, k: int) -> int:
    group, element = numerics(activation)
    return m * k // (2 if element == "e2m1" else 1) + m * k // group


QUANTIZE_FP8 = Kernel(
    "quantize_fp8",
    "quantize/fp8",
    naive_quantize_fp8,
    compile=_fp8_cases,
    stress=_fp8_stress,
    measured={
        "fp8_per_token": Rounding(
            lambda capability: capability >= 89,
            _run_fp8,
            lambda m, k: m * k,
        )
    },
)
RMS_NORM_FP8 = Kernel(
    "rms_norm_fp8",
    "quantize/rms_norm",
    naive_rms_norm_fp8,
    compile=_rms_norm_cases,
    stress=_rms_norm_stress,
)
SWIGLU_FP8 = Kernel(
    "swiglu_fp8",
    "quantize/gated",
    naive_swiglu_fp8,
    compile=_gated_cases,
    stress=_gated_stress,
)
QUANTIZE_BLOCKS = Kernel(
    "quantize_blocks",
    "quantize/blocks",
    naive_quantize_blocks,
    compile=_blocks_cases,
    stress=_blocks_stress,
    measured={
        name: Rounding(lambda _: True, partial(_run_blocks, name), partial(_block_bytes, name), numerics(name)[0] == 16)
        for name in BLOCK_ACTIVATIONS
    },
)
QUANTIZE_INT8 = Kernel(
    "quantize_int8",
    "quantize/int8",
    naive_quantize_int8,
    compile=_int8_cases,
    stress=_int8_stress,
)
ROUNDING = Kernel(
    "rounding",
    "quantize",
    e4m3.to_e4m3,
    without={
        "compile": "functions that quantize/fp8, quantize/blocks and attention/store inline; it has no kernel",
        "stress": "functions that quantize/fp8, quantize/blocks and attention/store inline; it has no kernel",
    },
)
