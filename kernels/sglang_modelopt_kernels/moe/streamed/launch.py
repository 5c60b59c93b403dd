"""Choice of the configuration by sizes, and the launch, on a GPU of SM90."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton

from sglang_modelopt_kernels.early import early
from sglang_modelopt_kernels.gemm.common import KernelConfig, checked, machine
from sglang_modelopt_kernels.gemm.common.arrivals import COUNTERS, arrivals
from sglang_modelopt_kernels.gemm.w4_stream.launch import DESCALE
from sglang_modelopt_kernels.gemm.w4_stream.packing import BLOCKS, WIDTH, Kind
from sglang_modelopt_kernels.moe.route import Routed

if TYPE_CHECKING:
    from sglang_modelopt_kernels.moe.grouped.weights import GroupedWeight

CONFIGS: dict[Kind, tuple[KernelConfig, ...]] = {
    "folded": (
        KernelConfig(64, 8, 256, 4, 4),
        KernelConfig(64, 16, 256, 4, 4),
        KernelConfig(64, 32, 256, 4, 3),
        KernelConfig(64, 64, 256, 4, 3),
    ),
    **dict.fromkeys(
        ("scaled_16", "scaled_32"),
        (
            KernelConfig(64, 8, 256, 4, 3),
            KernelConfig(64, 16, 256, 4, 3),
            KernelConfig(64, 32, 256, 4, 2),
            KernelConfig(64, 64, 256, 4, 2),
        ),
    ),
}
"""Configurations, ascending by pairs in a block, which are the same for all: of those that were timed on an H200 the fastest for
Qwen3-30B-A3B's experts."""
ROOM = 1.5
"""A block holds so many times the average pairs of an expert: with less, the weights of many experts are decoded twice."""
RESIDENT = 4
"""Programs on an SM that a launch has at least, before one takes several tiles of outputs or K is not split."""
LONG_BLOCK = 32
"""Pairs in a block from which a program takes several tiles of outputs. With fewer more programs are faster."""
LONGEST = 16
"""Steps of 256 K elements up to which a program takes several tiles of outputs."""
LEAST_STEPS = 8
"""Steps of 256 K elements that a split has at least: with four, one token took longer than without splits."""


@dataclass(frozen=True)
class Plan:
    """A configuration, the tiles of outputs that a program computes one after the other, and the splits along K."""

    config: KernelConfig
    rows: int = 1
    split: int = 1


def choose_block(pairs: int, experts: int) -> int:
    """Return the pairs in a block: the smallest block with ROOM for the average expert, or the largest."""
    known = [config.bm for config in CONFIGS["folded"]]
    return next((block for block in known if ROOM * pairs <= block * experts), known[-1])


def plan_of(weight: GroupedWeight, block: int, pairs: int, sms: int) -> Plan:
    """Return the plan of a launch for ``pairs`` pairs in blocks of ``block``.

    Raises:
        ValueError: no configuration has such blocks.
    """
    config = next((config for config in CONFIGS[weight.tiles] if config.bm == block), None)
    if config is None:
        raise ValueError(f"no configuration for tiles has blocks of {block} pairs")
    steps, tiles = weight.k // WIDTH, weight.n // config.bn
    # Blocks that are in use, about: each expert has one while pairs are few.
    blocks = max(min(pairs, weight.experts), pairs // block)
    least = RESIDENT * sms
    rows, split = 1, 1
    while (
        block >= LONG_BLOCK
        and 2 * rows * steps <= LONGEST
        and blocks * tiles >= 2 * rows * least
        and tiles % (2 * rows) == 0
    ):
        rows *= 2
    while rows == 1 and steps >= 2 * LEAST_STEPS * split and 2 * split * blocks * tiles <= least:
        split *= 2
    return Plan(config, rows, split)


def run(
    x: torch.Tensor,
    weight: GroupedWeight,
    routed: Routed,
    pairs: int,
    row_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
    known: bool = False,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Launch the kernel; arguments of :func:`grouped_linear`, and ``plan`` instead of the choice by size."""
    from .kernel import streamed_experts_kernel  # needs a Triton with Gluon: see gemm/w4_stream/available.py

    plan = plan or plan_of(weight, routed.block, pairs, machine(x.device)[1])
    config, blocks, kind = plan.config, routed.owner.shape[0], weight.tiles
    n, tiles = weight.n, weight.n // config.bn
    if plan.split > 1 and blocks * tiles > COUNTERS:
        raise ValueError(f"a product of more than {COUNTERS} tiles is not split along K, got {blocks * tiles}")
    y = torch.empty((pairs, n), dtype=out_dtype, device=x.device)
    partials = torch.empty((plan.split, pairs, n), device=x.device) if plan.split > 1 else y
    checked(
        streamed_experts_kernel[(blocks, triton.cdiv(tiles, plan.rows), plan.split)](
            x.contiguous(),
            weight.codes,
            weight.scale,
            routed.pairs,
            routed.owner,
            # A pointer stands for an absent tensor; the kernel never reads through it.
            weight.out_scale if row_scale is None else row_scale.contiguous(),
            weight.out_scale,
            y,
            partials,
            arrivals(x.device) if plan.split > 1 else y,
            pairs,
            pairs // x.shape[0],
            1 if row_scale is None else pairs // row_scale.shape[0],
            weight.experts,
            plan.rows,
            n,
            weight.k,
            FP8=kind == "folded",
            BLOCKS=BLOCKS[kind],
            STAGES=config.stages,
            DESCALE=DESCALE[kind],
            HAS_ROW_SCALE=row_scale is not None,
            SPLIT_K=plan.split,
            KNOWN=known,
            SINGLE=routed.single,
            BN=config.bn,
            BM=config.bm,
            num_warps=config.warps,
            **early(x.device),
        )
    )
    return y
