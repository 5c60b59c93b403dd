"""Rows of the products with packed 4-bit weights: decoded in registers, and group-scaled for many tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.registry.base import Case, Kernel, Launch, Product, StressCase, Tiled
from benchmarks.registry.operands import (
    DTYPES,
    KINDS,
    MANY,
    SPLIT,
    WIDTHS,
    N,
    activation_types,
    product_case,
    random_fp8,
    random_scale,
    stress_activations,
    tokens_for,
)
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.formats.base import BlockWeight
from sglang_modelopt_kernels.gemm import group_scaled
from sglang_modelopt_kernels.gemm.common import matrix_instruction
from sglang_modelopt_kernels.gemm.common.launch import Plan
from sglang_modelopt_kernels.gemm.group_scaled.kernel import group_scaled_kernel
from sglang_modelopt_kernels.gemm.group_scaled.launch import WIDTH
from sglang_modelopt_kernels.gemm.w4_decode import (
    PackedWeight,
    block_scaled_linear,
    launch,
    naive_block_scaled_linear,
    pack,
)
from sglang_modelopt_kernels.gemm.w4_decode.kernel import block_scaled_kernel, decode_kernel
from sglang_modelopt_kernels.gemm.w4_decode.packing import Kind

FORMATS: dict[str, Kind] = {
    "nvfp4": "e2m1_e4m3",
    "nvfp4_w4a8": "e2m1_e4m3",
    "mxfp4": "e2m1_exponent",
    "int4_awq": "int4_float",
}
"""Weight formats of the stress cases, and the kind that each is packed as."""


def _scale_type(kind: Kind) -> str:
    return "*fp32" if kind == "int4_float" else "*u8"


def _product_cases(arch: int) -> Iterator[Case]:
    """Yield every configuration that the launcher can choose."""
    for kind, group in KINDS:
        for dtype in activation_types(arch):
            f16 = dtype != "bf16"
            operands = {"x_ptr": f"*{dtype}", "w_ptr": "*i16", "s_ptr": _scale_type(kind)}
            numerics = {"KIND": kind, "GROUP": group, "F16": f16, "ASM": True, "DESCALE": launch.descale(kind, f16)}
            for config in dict.fromkeys((*launch.configs(kind, arch), *launch.configs(kind, arch, 128))):
                own: dict[str, Any] = {"ORDERED": launch.in_order(config)}
                own["FRAGMENTS"] = launch.makes_operands(kind, group, 4096, config, arch)
                own |= {"WGMMA": matrix_instruction(arch) == "wgmma", "PDL": arch >= 90}
                of_x = {"x_ptr": "*fp16"} if own["ORDERED"] and f16 else {}
                name = f"block_scaled {kind}/{group} {dtype}"
                case = product_case(name, block_scaled_kernel, config, operands | of_x, numerics | own, "any")
                yield dataclasses.replace(case, fragments=own["FRAGMENTS"])


def _decode_cases(arch: int) -> Iterator[Case]:
    """Yield the decoding of a packed weight for a dense product: of one weight, and of those of all experts."""
    for kind, group in KINDS:
        fp8 = arch >= 89 and kind in ("e2m1_exponent", "int4_float")
        for out in ("fp16", "bf16", *(["fp8e4nv"] if fp8 else [])):
            for owned in (False, True):
                types = {"w_ptr": "*i16", "s_ptr": _scale_type(kind), "y_ptr": f"*{out}"}
                types |= {"block_ptr": "*i32"} | dict.fromkeys(("first", "n", "k", "per"), "i32")
                constexprs = {"KIND": kind, "GROUP": group, "F16": out != "bf16", "FP8": out == "fp8e4nv"}
                constexprs |= {"ASM": True, "OWNED": owned, "BN": 16}
                name = f"decode {kind}/{group} {out}{',experts' if owned else ''}"
                yield Case(name, decode_kernel, types, constexprs, {}, ("k",))


def _compile(arch: int) -> Iterator[Case]:
    yield from _product_cases(arch)
    yield from _decode_cases(arch)


def _group_scaled_cases(arch: int) -> Iterator[Case]:
    for dtype in activation_types(arch):
        operands = {"x_ptr": f"*{dtype}", "u_ptr": f"*{dtype}", "s_ptr": "*fp32", "first": "i32", "count": "i32"}
        config = group_scaled.config_for(arch, 1 if dtype == "fp8e4nv" else 2)
        numerics = {"GROUP": 128, "ASM": True, "WIDTH": WIDTH}
        case = product_case(f"group_scaled {dtype}", group_scaled_kernel, config, operands, numerics, "any")
        constexprs = {key: value for key, value in case.constexprs.items() if key in group_scaled_kernel.arg_names}
        yield dataclasses.replace(case, constexprs=constexprs, aligned=("n", "k", "first"))


def _stress(capability: int) -> Iterator[StressCase]:
    """Yield every configuration, whole and split along K, and the ways that decode E2M1 weights for a dense product."""
    for number, kind in FORMATS.items():
        for width, k in WIDTHS.items():
            if k % WEIGHT_FORMATS[number].group_size:
                continue
            for dtype in _activations_of(capability):
                if dtype == "fp16" and width != "whole":
                    continue
                for config in launch.configs(kind, capability, k):
                    for split in (1, SPLIT) if width == "whole" and dtype != "fp16" else (1,):
                        name = f"block_scaled {number} {dtype} {width} {config} split {split}"
                        yield StressCase(name, partial(_launch, number, k, dtype, (config, split)))
                if width == "whole" and kind != "int4_float":
                    for way in ["dense", *(["fp8"] if number == "mxfp4" and dtype == "fp8" else [])]:
                        yield from _decoded_cases(number, k, dtype, way)


def _group_scaled_stress(capability: int) -> Iterator[StressCase]:
    """Yield INT4 decoded for the group-scaled product."""
    for dtype in _activations_of(capability):
        yield from _decoded_cases("int4_awq", WIDTHS["whole"], dtype, "groups")


def _activations_of(capability: int) -> list[str]:
    return [name for name in DTYPES if name != "fp8" or capability >= 89]


def _decoded_cases(number: str, k: int, dtype: str, way: str) -> Iterator[StressCase]:
    for tokens in MANY:
        name = f"block_scaled {number} {dtype} {way} {tokens} tokens"
        yield StressCase(name, partial(_launch_decoded, number, k, dtype, way, tokens))


def _stress_weight(number: str, k: int) -> PackedWeight:
    """Pack a random weight whose rows differ in size."""
    generator = torch.Generator("cuda").manual_seed(k)
    weight = torch.randn(N, k, generator=generator, device="cuda")
    weight *= torch.exp2(-(torch.arange(N, device="cuda") % 8)).unsqueeze(1)
    found = WEIGHT_FORMATS[number]
    blocks = found.blocks(found.quantize(weight.to(torch.bfloat16)))
    if blocks is None:
        raise ValueError(f"{number} has no blocks")
    return pack(blocks)


def _launch(number: str, k: int, dtype: str, plan: Plan) -> Launch:
    packed = _stress_weight(number, k)
    x, row_scale = stress_activations(tokens_for(*plan), k, dtype)
    expected = naive_block_scaled_linear(x, packed, row_scale)
    return Launch(lambda: launch.run(x, packed, row_scale, None, torch.bfloat16, plan), expected)


def _launch_decoded(number: str, k: int, dtype: str, way: str, tokens: int) -> Launch:
    packed = _stress_weight(number, k)
    x, row_scale = stress_activations(tokens, k, dtype)
    expected = naive_block_scaled_linear(x, packed, row_scale)
    run: Any = {"dense": launch.run_dense, "groups": launch.run_groups, "fp8": launch.run_fp8}[way]
    return Launch(lambda: run(x, packed, row_scale, None, torch.bfloat16), expected)


def _weight(kind: str, n: int, k: int) -> dict[str, Any]:
    """Pack a random weight of small values."""
    one = torch.full((), 2.0**-6, device="cuda")
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
    if kind == "int4":
        scale = torch.rand(n, k // 128, device="cuda") + 0.5
        packed = pack(BlockWeight(codes.to(torch.int8) - 8, scale, one, "int4", 128))
    else:
        packed = pack(BlockWeight(codes, random_scale(kind, n, k), one, "e2m1", 32 if kind == "mxfp4" else 16))
    return {"weight": packed, "codes": packed.codes, "scale": packed.scale}


def _product(kind: str) -> Product:
    return Product(
        lambda _: True,
        partial(_weight, kind),
        random_fp8,
        lambda x, weight, out_dtype: block_scaled_linear(x, weight["weight"], out_dtype=out_dtype),
        lambda x, weight: naive_block_scaled_linear(x, weight["weight"]),
    )


def _tiled(kind: Kind, product: str, bks: tuple[int, ...]) -> Tiled:
    return Tiled(block_scaled_kernel, product, launch.run, partial(launch.configs, kind), bks)


W4_DECODE = Kernel(
    "block_scaled",
    "gemm/w4_decode",
    naive_block_scaled_linear,
    compile=_compile,
    stress=_stress,
    measured={kind: _product(kind) for kind in ("nvfp4", "mxfp4", "int4")},
    tiles={
        "block_scaled:e2m1_e4m3/16": _tiled("e2m1_e4m3", "nvfp4", (64, 128, 256)),
        "block_scaled:e2m1_exponent/32": _tiled("e2m1_exponent", "mxfp4", (64, 128, 256)),
        "block_scaled:int4_float/128": _tiled("int4_float", "int4", (128,)),
    },
)
GROUP_SCALED = Kernel(
    "group_scaled",
    "gemm/group_scaled",
    group_scaled.naive_multiply,
    compile=_group_scaled_cases,
    stress=_group_scaled_stress,
    tiles={
        "groups:int4_float/128": Tiled(
            group_scaled_kernel,
            "int4",
            launch.run_groups,
            lambda capability: (group_scaled.config_for(capability, 1),),
            (64, 128),
            (8, 8),
            splits=False,
        )
    },
)
