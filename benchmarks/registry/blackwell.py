"""Rows of the products in block-scaled matrix instructions of Blackwell: two of SM120, and one of SM100 and SM103 (tcgen05)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.registry.base import Case, Kernel, Product
from benchmarks.registry.operands import capability, product_case, random_codes, random_fp8, random_scale
from sglang_modelopt_kernels.formats.base import BlockActivation
from sglang_modelopt_kernels.gemm.blackwell_common import takes_tiles
from sglang_modelopt_kernels.gemm.blackwell_common.kernel import tcgen05_kernel
from sglang_modelopt_kernels.gemm.blackwell_common.launch import HEIGHT, TILE
from sglang_modelopt_kernels.gemm.common import KernelConfig
from sglang_modelopt_kernels.gemm.fp4_blackwell import fp4_linear, naive_fp4_linear
from sglang_modelopt_kernels.gemm.fp4_blackwell import linear as fp4
from sglang_modelopt_kernels.gemm.fp4_blackwell.kernel import fp4_kernel
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell import linear as mxfp4
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell import mxfp4_linear, naive_mxfp4_linear, pair_blocks
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell.kernel import mxfp4_widened_kernel
from sglang_modelopt_kernels.quantize.blocks import naive_swizzle, naive_unswizzle

NOT_RUN = {"stress": "run on no GPU yet; benchmarks.gemm compares the product with the naive twin first"}


def _tcgen05_of(name: str, element: str, group: int, every: tuple[KernelConfig, ...], matrix: str) -> Iterator[Case]:
    """Yield every configuration, through TMA descriptors and through pointers: operands' sizes decide which runs."""
    per_entry, scale = (2 if element == "e2m1" else 1), "fp8e4nv" if group == 16 else "u8"
    values = "u8" if element == "e2m1" else "fp8e4nv"
    for described in (True, False):
        for config in every:
            swizzled = element == "e2m1" and takes_tiles(config.bm)
            box = f"{config.bk // group // 4},2,256"
            operands = {"x": f"*{values}", "w": "*u8", "s": f"*{scale}", "t": f"*{scale}"}
            if described:
                operands["x"] = f"tensordesc<{values}[{config.bm},{config.bk // per_entry}]>"
                operands["w"] = f"tensordesc<u8[{config.bn},{config.bk // 2}]>"
                operands["s"] = f"tensordesc<{scale}[{config.bn // TILE},{box}]>"
                operands["t"] = f"tensordesc<{scale}[{config.bm // TILE},{box}]>" if swizzled else operands["t"]
            numerics = {"X": element, "GROUP": group, "NATIVE": True, "DESCRIBED": described, "SWIZZLED": swizzled}
            numerics |= {"PERSISTENT": config.persistent, "HEIGHT": HEIGHT}
            label = name if described else f"{name},pointers"
            case = product_case(label, tcgen05_kernel, config, operands, numerics, matrix)
            copies = ("tcgen05.cp", "cp.async.bulk.tensor") if described else ("tcgen05.cp",)
            yield dataclasses.replace(case, copies=copies)


def _tcgen05_cases(arch: int) -> Iterator[Case]:
    del arch
    yield from _tcgen05_of("mxfp4 fp8e4nv", "e4m3", 32, mxfp4.CONFIGS, "kind::mxf8f6f4.block_scale")
    for group, kind in ((16, "mxf4nvf4"), (32, "mxf4")):
        yield from _tcgen05_of(f"fp4 e2m1/{group}", "e2m1", group, fp4.SWIZZLED_CONFIGS, f"kind::{kind}.block_scale")


def _mxfp4_cases(arch: int) -> Iterator[Case]:
    del arch
    operands = {"x_ptr": "*fp8e4nv", "w_ptr": "*u8", "s_ptr": "*u8"}
    numerics = {"ASM": True, "DESCALE": mxfp4.WIDENED_DESCALE}
    wanted = "kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3"
    for config in mxfp4.PAIRED_CONFIGS:
        yield product_case("mxfp4 fp8e4nv", mxfp4_widened_kernel, config, operands, numerics, wanted)


def _fp4_cases(arch: int) -> Iterator[Case]:
    del arch
    for group, scale in ((16, "fp8e4nv"), (32, "u8")):
        operands = {"x_ptr": "*u8", "w_ptr": "*u8", "s_ptr": f"*{scale}", "t_ptr": f"*{scale}"}
        # SM120 has one instruction for both, which differ in the K elements under a scale.
        wanted = f"kind::mxf4nvf4.block_scale.scale_vec::{64 // group}X"
        for config in fp4.CONFIGS:
            numerics = {"GROUP": group, "NATIVE": True}
            yield product_case(f"fp4 e2m1/{group}", fp4_kernel, config, operands, numerics, wanted)


def _weight(kind: str, n: int, k: int) -> dict[str, Any]:
    """Make a random weight as ModelOpt stores it, and its paired blocks for SM120 or its swizzled scales for SM100 and SM103."""
    codes, scale = random_codes(n, k), random_scale(kind, n, k)
    weight = {"codes": codes, "scale": scale, "out_scale": torch.ones(n, device="cuda")}
    return weight | ({"paired": pair_blocks(codes)} if capability() >= 120 else {"swizzled": naive_swizzle(scale)})


def _run_mxfp4(x: torch.Tensor, weight: Mapping[str, Any], out_dtype: torch.dtype) -> torch.Tensor:
    codes, scale = weight.get("paired", weight["codes"]), weight.get("swizzled", weight["scale"])
    return mxfp4_linear(x, codes, scale, weight["out_scale"], None, None, out_dtype, "paired" in weight)


def _reads_swizzled(m: int) -> bool:
    """Return whether the product of ``m`` FP4 tokens reads their block scales in the 128x4 swizzled layout."""
    return capability() < 120 and takes_tiles(m)


def _random_fp4(kind: str, m: int, k: int) -> BlockActivation:
    """Make random FP4 activations, their block scales swizzled where the product reads them so."""
    scale = random_scale(kind, m, k)
    return BlockActivation(random_codes(m, k), naive_swizzle(scale) if _reads_swizzled(m) else scale, None)


def _naive_fp4(x: BlockActivation, weight: Mapping[str, Any]) -> torch.Tensor:
    m, blocks = x.codes.shape[0], weight["scale"].shape[1]
    scale = naive_unswizzle(x.scale, m, blocks) if _reads_swizzled(m) else x.scale
    return naive_fp4_linear(BlockActivation(x.codes, scale, None), weight["codes"], weight["scale"])


def _run_fp4(x: BlockActivation, weight: Mapping[str, Any], out_dtype: torch.dtype) -> torch.Tensor:
    scale, swizzled = weight.get("swizzled", weight["scale"]), "swizzled" in weight
    return fp4_linear(x, weight["codes"], scale, weight["out_scale"], None, out_dtype, swizzled)


def _is_blackwell(capability: int) -> bool:
    return capability // 10 in (10, 12)


def _fp4_product(kind: str) -> Product:
    return Product(_is_blackwell, partial(_weight, kind), partial(_random_fp4, kind), _run_fp4, _naive_fp4, 2.0**-10)


MXFP4_FP8_BLACKWELL = Kernel(
    "mxfp4",
    "gemm/mxfp4_fp8_blackwell",
    naive_mxfp4_linear,
    (120,),
    compile=_mxfp4_cases,
    measured={
        "mxfp4 x fp8": Product(
            _is_blackwell,
            partial(_weight, "mxfp4"),
            random_fp8,
            _run_mxfp4,
            lambda x, weight: naive_mxfp4_linear(x, weight["codes"], weight["scale"]),
            2.0**-10,
        )
    },
    without=NOT_RUN,
)
FP4_BLACKWELL = Kernel(
    "fp4",
    "gemm/fp4_blackwell",
    naive_fp4_linear,
    (120,),
    compile=_fp4_cases,
    measured={"nvfp4 x nvfp4": _fp4_product("nvfp4"), "mxfp4 x mxfp4": _fp4_product("mxfp4")},
    without=NOT_RUN,
)
TCGEN05 = Kernel(
    "tcgen05",
    "gemm/blackwell_common",
    naive_fp4_linear,
    (100, 103),
    compile=_tcgen05_cases,
    without=NOT_RUN,
)
