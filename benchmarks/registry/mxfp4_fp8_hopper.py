"""Row of the MXFP4 x FP8 product of SM89 and SM90."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.registry.base import Case, Kernel, Launch, Product, StressCase, Tiled
from benchmarks.registry.operands import (
    MANY,
    SPLIT,
    WIDTHS,
    N,
    dense_values,
    product_case,
    random_codes,
    random_fp8,
    random_scale,
    stress_activations,
    tokens_for,
)
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.gemm.common.launch import Plan
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import fold, folded_linear, linear, naive_folded_linear
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper.kernel import folded_kernel, unfold_kernel
from sglang_modelopt_kernels.gemm.w4_stream.launch import TILED

ARCHITECTURES = (89, 90)


def _compile(arch: int) -> Iterator[Case]:
    """Yield every configuration that the launcher can choose, for whole tiles of K and not, and the decoding for many tokens."""
    operands = {"x_ptr": "*fp8e4nv", "w_ptr": "*u8", "s_ptr": "*u8"}
    for config in (*linear.configs(arch), *linear.configs(arch, 128)):
        for name, even in (("fp8e4nv", True), ("fp8e4nv,tail", False)):
            numerics = {"ASM": True, "TILED": False, "EVEN_K": even, "PDL": arch >= 90}
            case = product_case(f"folded {name}", folded_kernel, config, operands, numerics, "e4m3")
            yield dataclasses.replace(case, fragments=True)
    for config in TILED if arch == 90 else ():
        numerics = {"ASM": True, "TILED": True, "EVEN_K": True, "PDL": True}
        case = product_case("folded tiled fp8e4nv", folded_kernel, config, operands, numerics, "e4m3")
        yield dataclasses.replace(case, fragments=True)
    types = {"w_ptr": "*i32", "s_ptr": "*u8", "y_ptr": "*i32"} | dict.fromkeys(("first", "n", "k"), "i32")
    yield Case("unfold fp8", unfold_kernel, types, {"ASM": True, "BN": 8}, {}, ("k",))


def _stress(capability: int) -> Iterator[StressCase]:
    if capability not in ARCHITECTURES:
        return
    for width, k in WIDTHS.items():
        for config in linear.configs(capability, k):
            for split in (1, SPLIT) if width == "whole" else (1,):
                name = f"folded mxfp4 fp8 {width} {config} split {split}"
                yield StressCase(name, partial(_launch, k, (config, split)))
        yield StressCase(f"folded mxfp4 fp8 {width} dense", partial(_launch, k, None))


def _launch(k: int, plan: Plan | None) -> Launch:
    found = WEIGHT_FORMATS["mxfp4"]
    generator = torch.Generator("cuda").manual_seed(k)
    stored = found.quantize(torch.randn(N, k, generator=generator, device="cuda").to(torch.bfloat16))
    weight = fold(stored["weight"], stored["weight_scale"])
    x, row_scale = stress_activations(tokens_for(*plan) if plan else MANY[-1], k, "fp8")
    expected = (x.double() @ dense_values(found.decode(stored)).T) * row_scale.double()
    if plan is None:
        return Launch(lambda: linear.run_dense(x, weight, row_scale, None, torch.bfloat16), expected)
    return Launch(lambda: linear.run(x, weight, row_scale, None, torch.bfloat16, plan), expected)


def _weight(n: int, k: int) -> dict[str, Any]:
    """Pack a random MXFP4 weight."""
    packed = fold(random_codes(n, k), random_scale("mxfp4", n, k))
    return {"weight": packed, "codes": packed.codes, "scale": packed.exponent}


MXFP4_FP8_HOPPER = Kernel(
    "folded",
    "gemm/mxfp4_fp8_hopper",
    naive_folded_linear,
    ARCHITECTURES,
    compile=_compile,
    stress=_stress,
    measured={
        "mxfp4 folded": Product(
            lambda capability: capability in ARCHITECTURES,
            _weight,
            random_fp8,
            lambda x, weight, out_dtype: folded_linear(x, weight["weight"], out_dtype=out_dtype),
            lambda x, weight: naive_folded_linear(x, weight["weight"]),
            2.0**-10,
        )
    },
    tiles={"folded": Tiled(folded_kernel, "mxfp4 folded", linear.run, linear.configs, (128, 256, 512))},
)
