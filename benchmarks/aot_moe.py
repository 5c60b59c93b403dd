"""The compilations of the experts' kernels (:mod:`benchmarks.aot`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.aot_case import KINDS, Case
from sglang_modelopt_kernels.gemm.common import KernelConfig, matrix_instruction
from sglang_modelopt_kernels.moe.combine.kernel import combine_kernel
from sglang_modelopt_kernels.moe.grouped import launch as grouped
from sglang_modelopt_kernels.moe.grouped.dense import launch as dense
from sglang_modelopt_kernels.moe.grouped.dense.kernel import dense_kernel
from sglang_modelopt_kernels.moe.grouped.kernel import grouped_kernel
from sglang_modelopt_kernels.moe.route.kernel import route_kernel
from sglang_modelopt_kernels.moe.swiglu.kernel import swiglu_kernel

GROUPED: tuple[tuple[grouped.Kind, int, str, str | None], ...] = (
    # kind, inputs to a block scale, Triton's types of codes and of scales
    *((kind, group, "*i16", "*fp32" if kind == "int4_float" else "*u8") for kind, group in KINDS),
    ("mxfp4", 32, "*u8", "*u8"),
    ("e4m3", 0, "*fp8e4nv", None),
    ("e4m3_float", 128, "*fp8e4nv", "*fp32"),
    ("e4m3_exponent", 32, "*fp8e4nv", "*u8"),
    ("int8", 0, "*i8", None),
    ("bf16", 0, "*bf16", None),
)


QUICK_GROUPED = ("grouped e2m1_e4m3/16 bf16", "grouped mxfp4/32 fp8e4nv", "grouped_dense bf16")


def grouped_cases(arch: int) -> Iterator[Case]:
    """Every configuration of the product of all experts, eight rows to a token, and what stands around it."""
    dtypes = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    if arch >= 89:
        dtypes[torch.float8_e4m3fn] = "fp8e4nv"
    for kind, group, codes, scale in GROUPED:
        if kind == "mxfp4" and matrix_instruction(arch) != "tcgen05":
            continue
        for dtype, name in dtypes.items():
            try:
                math = grouped.math_of(kind, dtype, arch)
            except ValueError:
                continue  # refused likewise by the launch
            for config in dict.fromkeys((*grouped.configs(kind, math, arch), *grouped.configs(kind, math, arch, 128))):
                own = {"KIND": kind, "GROUP": group, "MATH": math, "NATIVE": arch >= 89, "ASM": True}
                own |= {"DESCALE": grouped.descale(kind, math), "HAS_ROW_SCALE": True, "SHARE": 8, "EVEN_K": True}
                own |= {"FRAGMENTS": grouped.makes_fragments(kind, group, 4096, config, arch)}
                own |= {"WGMMA": matrix_instruction(arch) == "wgmma"}
                types = {"x_ptr": f"*{name}", "w_ptr": codes if arch >= 89 else codes.replace("fp8e4nv", "u8")}
                types |= {
                    "s_ptr": scale or "*fp32",
                    "row_scale_ptr": "*fp32",
                    "out_scale_ptr": "*fp32",
                    "y_ptr": "*bf16",
                }
                types |= {"pairs_ptr": "*i32", "owner_ptr": "*i32"} | dict.fromkeys(
                    ("pairs", "experts", "n", "k"), "i32"
                )
                yield Case(
                    f"grouped {kind}/{group} {name} {config}",
                    grouped_kernel,
                    types,
                    own | {"BN": config.bn, "BM": config.bm, "BK": config.bk},
                    {"num_warps": config.warps, "num_stages": config.stages},
                    aligned=("n", "k"),
                    matrix="kind::mxf8f6f4.block_scale" if kind == "mxfp4" else "any",
                    weights=config.bn * config.bk,
                    fragments=own["FRAGMENTS"],
                )
    yield from dense_cases(arch)
    integers = dict.fromkeys(("pairs", "experts", "blocks"), "i32")
    types = dict.fromkeys(("experts_ptr", "sorted_ptr", "owner_ptr", "first_ptr"), "*i32") | integers
    for chunk, warps in ((128, 4), (4096, 8)):
        constexprs = {"BLOCK": 16, "CHUNK": chunk, "BINS": 256}
        yield Case(f"route {chunk} pairs", route_kernel, types, constexprs, {"num_warps": warps})
    types = {"h_ptr": "*bf16", "y_ptr": "*bf16", "inner": "i32"}
    yield Case("swiglu", swiglu_kernel, types, {"BLOCK": 1024}, {}, ("inner",))
    types = {"y_ptr": "*bf16", "weight_ptr": "*fp32", "out_ptr": "*bf16", "n": "i32"}
    yield Case("combine", combine_kernel, types, {"HAS_WEIGHTS": True, "TOP_K": 8, "BLOCK": 1024}, {}, ("n",))


def dense_cases(arch: int) -> Iterator[Case]:
    """The product of all experts in dense tiles, of every type of operands, with and without block scales."""
    names = {torch.float16: "fp16", torch.bfloat16: "bf16"} | ({torch.float8_e4m3fn: "fp8e4nv"} if arch >= 89 else {})
    for dtype, name in names.items():
        for scaled in (False, True):
            for config in dense.configs(dtype, scaled, arch):
                yield _dense_case(name, config, scaled)


def _dense_case(name: str, config: KernelConfig, scaled: bool) -> Case:
    types = dict.fromkeys(("x_ptr", "w_ptr"), f"*{name}")
    types |= dict.fromkeys(("s_ptr", "row_scale_ptr", "out_scale_ptr"), "*fp32") | {"y_ptr": "*bf16"}
    types |= dict.fromkeys(("pairs_ptr", "owner_ptr", "first_ptr"), "*i32")
    types |= dict.fromkeys(("pairs", "share", "experts", "first", "last", "rows", "n", "k"), "i32")
    own = {"GROUP": 128 if scaled else 0, "FP8": name == "fp8e4nv", "ASM": True, "DESCALE": 2.0}
    own |= {"HAS_ROW_SCALE": True, "NARROW": True, "EVEN_K": True, "STRIPE": dense.STRIPE}
    return Case(
        f"grouped_dense {name}{',scaled' if scaled else ''} {config}",
        dense_kernel,
        types,
        own | {"BN": config.bn, "BM": config.bm, "BK": config.bk},
        {"num_warps": config.warps, "num_stages": config.stages},
        aligned=("rows", "n", "k"),
        matrix="any",
        weights=config.bn * config.bk,
    )
