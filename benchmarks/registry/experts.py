"""Rows of the products of all experts: decoded in registers, in dense tiles, and streamed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.registry.base import Case, ExpertFormat, Kernel, Launch, StressCase
from benchmarks.registry.operands import KINDS, TRITON_TYPES
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.gemm.common import KernelConfig, matrix_instruction
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import fold
from sglang_modelopt_kernels.gemm.reference import prepare_dense
from sglang_modelopt_kernels.gemm.w4_decode import pack
from sglang_modelopt_kernels.gemm.w4_stream import missing, packing, stream_folded, stream_nvfp4
from sglang_modelopt_kernels.gemm.w4_stream.launch import DESCALE
from sglang_modelopt_kernels.gemm.w4_stream.packing import BLOCKS
from sglang_modelopt_kernels.moe import grouped
from sglang_modelopt_kernels.moe.grouped import GroupedWeight, grouped_linear, launch, naive_grouped_linear, unpack
from sglang_modelopt_kernels.moe.grouped.dense import launch as dense
from sglang_modelopt_kernels.moe.grouped.dense.kernel import dense_kernel
from sglang_modelopt_kernels.moe.grouped.kernel import grouped_kernel
from sglang_modelopt_kernels.moe.grouped.weights import TILES, Kind
from sglang_modelopt_kernels.moe.route import route, unsorted
from sglang_modelopt_kernels.moe.streamed import launch as streamed

STORED_TYPES: tuple[tuple[Kind, int, str, str | None], ...] = (
    *((kind, group, "*i16", "*fp32" if kind == "int4_float" else "*u8") for kind, group in KINDS),
    ("mxfp4", 32, "*u8", "*u8"),
    ("e4m3", 0, "*fp8e4nv", None),
    ("e4m3_float", 128, "*fp8e4nv", "*fp32"),
    ("e4m3_exponent", 32, "*fp8e4nv", "*u8"),
    ("int8", 0, "*i8", None),
    ("bf16", 0, "*bf16", None),
)
"""Kinds, the K elements under a block scale, and Triton's types of codes and of scales."""
FORMATS: dict[Kind, str] = {
    "e2m1_e4m3": "nvfp4_w4a8",
    "e2m1_exponent": "mxfp4",
    "int4_float": "int4_awq",
    "mxfp4": "mxfp4",
    "mxfp4_tiles": "mxfp4",
    "nvfp4_tiles": "nvfp4_w4a8",
    "e4m3": "fp8_per_channel",
    "e4m3_float": "fp8_block",
    "e4m3_exponent": "mxfp8",
    "int8": "int8_per_channel",
    "bf16": "fp8",
}
"""A weight format that is kept as each kind."""
WHOLE = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8, "bf16": torch.bfloat16}
"""Kinds without block scales, and the dtype of their codes."""

STREAMED: dict[Kind, packing.Kind] = {"mxfp4_tiles": "folded", "nvfp4_tiles": "scaled_32"}
"""Kinds of the streamed product, and how the tiles of FORMATS' formats are read."""

DTYPES = {torch.float8_e4m3fn: "fp8", torch.bfloat16: "bf16", torch.float16: "fp16"}
EXPERTS, TOP_K, N = 16, 4, 1536
WIDTHS = {"whole": 2048, "half": 2048 - 128, "tail": 2048 - 32}
"""Problem of the stress cases; K by the tiles that it fills, as of the other products."""


def _activations(arch: int) -> dict[torch.dtype, str]:
    names = {dtype: TRITON_TYPES[dtype] for dtype in (torch.float16, torch.bfloat16)}
    return names | ({torch.float8_e4m3fn: "fp8e4nv"} if arch >= 89 else {})


def _is_scaled(kind: Kind) -> bool:
    """Return whether the sum over each block is scaled, and not the weight."""
    return kind in ("int4_float", "e4m3_float")


def _compile(arch: int) -> Iterator[Case]:
    """Yield every configuration that the launcher can choose, eight pairs to a token."""
    for kind, group, codes, scale in STORED_TYPES:
        if kind == "mxfp4" and matrix_instruction(arch) != "tcgen05":
            continue
        for dtype, name in _activations(arch).items():
            try:
                math = launch.math_of(kind, dtype, arch)
            except ValueError:
                continue  # not supported by the launcher either
            types = {"x_ptr": f"*{name}", "w_ptr": codes if arch >= 89 else codes.replace("fp8e4nv", "u8")}
            types |= dict.fromkeys(("row_scale_ptr", "out_scale_ptr"), "*fp32") | {"s_ptr": scale or "*fp32"}
            types |= {"y_ptr": "*bf16", "pairs_ptr": "*i32", "owner_ptr": "*i32"}
            types |= dict.fromkeys(("pairs", "experts", "n", "k"), "i32")
            for config in dict.fromkeys((*launch.configs(kind, math, arch), *launch.configs(kind, math, arch, 128))):
                own: dict[str, Any] = {"KIND": kind, "GROUP": group, "MATH": math, "NATIVE": arch >= 89, "ASM": True}
                own |= {"DESCALE": launch.descale(kind, math), "HAS_ROW_SCALE": True, "SHARE": 8, "EVEN_K": True}
                own |= {"FRAGMENTS": launch.makes_fragments(kind, group, 4096, config, arch)}
                own |= {"WGMMA": matrix_instruction(arch) == "wgmma"}
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


def _dense_cases(arch: int) -> Iterator[Case]:
    """Yield every dtype of the operands, with and without block scales."""
    for dtype, name in _activations(arch).items():
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


def _problems(capability: int) -> Iterator[tuple[Kind, torch.dtype, str, int]]:
    """Yield the kinds, activations and K of the stress cases."""
    for kind, dtypes in launch.TAKEN.items():
        if (kind == "mxfp4" and not 100 <= capability < 120) or (kind in TILES and capability != 90):
            continue
        for dtype in dtypes:
            if dtype == torch.float8_e4m3fn and capability < 89:
                continue
            for width, k in WIDTHS.items():
                if kind in TILES and k % 256:
                    continue
                if (kind == "int4_float" and k % 128) or (width == "tail" and dtype == torch.float16):
                    continue
                yield kind, dtype, width, k


def _stress(capability: int) -> Iterator[StressCase]:
    for kind, dtype, width, k in _problems(capability):
        if kind in TILES:
            continue  # a kernel of its own
        math = launch.math_of(kind, dtype, capability)
        for config in launch.configs(kind, math, capability, k):
            name = f"experts {kind} {DTYPES[dtype]} {width} grouped {config.bm} pairs"
            yield StressCase(name, partial(_launch, kind, dtype, k, False, config.bm))


def _dense_stress(capability: int) -> Iterator[StressCase]:
    for kind, dtype, width, k in _problems(capability):
        for config in dense.configs(dtype, _is_scaled(kind), capability) if kind != "mxfp4" else ():
            name = f"experts {kind} {DTYPES[dtype]} {width} dense {config.bm} pairs"
            yield StressCase(name, partial(_launch, kind, dtype, k, True, config.bm))


def _weight(kind: Kind, k: int) -> GroupedWeight:
    """Make random weights of EXPERTS experts, kept as ``kind``."""
    generator = torch.Generator("cuda").manual_seed(k)
    number = WEIGHT_FORMATS[FORMATS[kind]]
    every = []
    for _ in range(EXPERTS):
        stored = number.quantize(torch.randn(N, k, generator=generator, device="cuda"))
        if kind == "mxfp4":
            every.append(grouped.mxfp4_as_stored(stored["weight"], stored["weight_scale"]))
        elif kind == "mxfp4_tiles":
            every.append(grouped.tiled(stream_folded(fold(stored["weight"], stored["weight_scale"]))))
        elif kind == "e4m3_exponent":
            every.append(grouped.mxfp8(stored["weight"], stored["weight_scale"]))
        elif kind == "e4m3_float":
            rows = stored["weight_scale"].reshape(-(-N // 128), -1).repeat_interleave(128, dim=0)[:N]
            every.append(grouped.float_blocks(stored["weight"], rows.contiguous()))
        elif kind in WHOLE:
            every.append(grouped.whole(*prepare_dense(number.decode(stored), WHOLE[kind])))
        else:
            blocks = number.blocks(stored)
            if blocks is None:
                raise ValueError(f"{number.name} has no blocks")
            every.append(grouped.tiled(stream_nvfp4(blocks)) if kind == "nvfp4_tiles" else grouped.packed(pack(blocks)))
    return grouped.stack(every)


def _operands(k: int, dtype: torch.dtype, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make activations of some blocks for each expert, the expert of each pair (some invalid), and a scale for each pair."""
    generator = torch.Generator("cuda").manual_seed(block)
    tokens = 61 * block // TOP_K if block <= 16 else 13 * block // TOP_K
    pairs = tokens * TOP_K
    chosen = torch.randint(-1, EXPERTS - 1, (pairs,), generator=generator, device="cuda", dtype=torch.int32)
    x = torch.randn(tokens, k, generator=generator, device="cuda").to(torch.float8_e4m3fn).to(dtype)
    return x, chosen, torch.rand(pairs, 1, generator=generator, device="cuda") + 0.5


def _expected(x: torch.Tensor, weight: GroupedWeight, chosen: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """Compute :func:`naive_grouped_linear`, one product for each expert instead of one for each pair."""
    expected = torch.zeros(chosen.shape[0], weight.n, dtype=torch.float64, device="cuda")
    rows = x.double().repeat_interleave(TOP_K, dim=0)
    for expert in range(EXPERTS):
        own = chosen == expert
        unit = unpack(weight, expert) * weight.out_scale[expert].double().unsqueeze(1)
        expected[own] = (rows[own] @ unit.T) * row_scale[own].double()
    return expected


def _launch(kind: Kind, dtype: torch.dtype, k: int, in_dense_tiles: bool, block: int) -> Launch:
    weight = _weight(kind, k)
    x, chosen, row_scale = _operands(k, dtype, block)
    routed, pairs = route(chosen, EXPERTS, block), chosen.shape[0]
    expected = _expected(x, weight, chosen, row_scale)
    return Launch(lambda: grouped_linear(x, weight, routed, pairs, row_scale, torch.bfloat16, in_dense_tiles), expected)


def _streamed_cases(arch: int) -> Iterator[Case]:
    """Yield every configuration that the launcher can choose, the weight fetched early."""
    if missing() is not None:
        return
    from sglang_modelopt_kernels.moe.streamed.kernel import streamed_experts_kernel

    types = {"w_ptr": "*u8", "s_ptr": "*u8", "y_ptr": "*bf16", "partial_ptr": "*fp32"}
    types |= dict.fromkeys(("pairs_ptr", "owner_ptr", "arrivals_ptr"), "*i32")
    types |= dict.fromkeys(("row_scale_ptr", "out_scale_ptr"), "*fp32")
    types |= dict.fromkeys(("pairs", "share", "scale_share", "experts", "rows", "n", "k"), "i32")
    for kind, config in ((kind, config) for kind, every in streamed.CONFIGS.items() for config in every):
        own: dict[str, Any] = {
            "STAGES": config.stages,
            "HAS_ROW_SCALE": True,
            "SPLIT_K": 1,
            "KNOWN": True,
            "SINGLE": False,
        }
        own |= {"FP8": kind == "folded", "BLOCKS": BLOCKS[kind], "DESCALE": DESCALE[kind]}
        yield Case(
            f"streamed experts {kind} {config}",
            streamed_experts_kernel,
            types | {"x_ptr": "*fp8e4nv" if kind == "folded" else "*fp16"},
            own | {"PDL": arch >= 90, "BN": config.bn, "BM": config.bm},
            {"num_warps": config.warps, "num_stages": config.stages},
            aligned=("n", "k"),
            matrix="e4m3" if kind == "folded" else "f16",
            weights=config.bn * config.bk,
            fragments=True,
            copies=("cp.async",),
        )


def _streamed_stress(capability: int) -> Iterator[StressCase]:
    if capability != 90 or missing() is not None:
        return
    for kind, read in STREAMED.items():
        for config in streamed.CONFIGS[read]:
            for rows, split in ((1, 1), (3, 1), (1, 2)):
                plan = streamed.Plan(config, rows, split)
                name = f"streamed experts {kind} {config} rows {rows} split {split}"
                yield StressCase(name, partial(_launch_streamed, kind, plan))
        for split in (1, 2):
            plan = streamed.Plan(streamed.CONFIGS[read][0], 1, split)
            name = f"streamed experts {kind} unsorted split {split}"
            yield StressCase(name, partial(_launch_streamed, kind, plan, True))


def _launch_streamed(kind: Kind, plan: streamed.Plan, single: bool = False) -> Launch:
    """Make a launch; ``single``: each pair in a block of its own, of more tokens than one to fill the GPU."""
    k, block = WIDTHS["whole"], plan.config.bm
    weight = _weight(kind, k)
    x, chosen, row_scale = _operands(k, launch.TAKEN[kind][0], block)
    if single:  # no more tiles than counters of arrivals
        x, chosen, row_scale = x[:40], chosen[: 40 * TOP_K], row_scale[: 40 * TOP_K]
    routed, pairs = unsorted(chosen, block) if single else route(chosen, EXPERTS, block), chosen.shape[0]
    expected = _expected(x, weight, chosen, row_scale)
    # The table of pairs is complete: the stress run compares each result before the next launch.
    return Launch(
        lambda: streamed.run(x, weight, routed, pairs, row_scale, torch.bfloat16, known=True, plan=plan), expected
    )


GROUPED = Kernel(
    "grouped",
    "moe/grouped",
    naive_grouped_linear,
    compile=_compile,
    stress=_stress,
    measured={
        "nvfp4": ExpertFormat("nvfp4", torch.bfloat16),
        "nvfp4 fp8": ExpertFormat("nvfp4_w4a8", torch.float8_e4m3fn),
        "mxfp4 fp8": ExpertFormat("mxfp4", torch.float8_e4m3fn),
        "int4": ExpertFormat("int4_awq", torch.bfloat16),
        "fp8": ExpertFormat("fp8_per_channel", torch.float8_e4m3fn),
        "mxfp8": ExpertFormat("mxfp8", torch.bfloat16),
        "int8": ExpertFormat("int8_per_channel", torch.bfloat16),
        "bf16": ExpertFormat("fp8", torch.bfloat16),
    },
)
GROUPED_DENSE = Kernel(
    "grouped_dense",
    "moe/grouped/dense",
    naive_grouped_linear,
    compile=_dense_cases,
    stress=_dense_stress,
)
STREAMED_EXPERTS = Kernel(
    "streamed_experts",
    "moe/streamed",
    naive_grouped_linear,
    (90,),
    compile=_streamed_cases,
    stress=_streamed_stress,
)
