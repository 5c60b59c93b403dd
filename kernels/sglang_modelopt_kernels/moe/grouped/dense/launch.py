"""Thresholds of the dense product, its configurations, and its launches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from sglang_modelopt_kernels.gemm.common import KernelConfig, checked, machine, matrix_instruction
from sglang_modelopt_kernels.gemm.w4_decode.launch import SCRATCH_BYTES
from sglang_modelopt_kernels.moe.route import Routed

from ..weights import GroupedWeight
from .decode import Part, block_scales, decode_experts, divisor, operand_of, parts
from .kernel import dense_kernel

STRIPE = 8
"""Blocks that share a weight tile while it is in L2."""
WHOLE_ABOVE = 16
"""Average pairs of an expert above which weights that need no decoding are multiplied in dense tiles."""
DECODED_FROM = {torch.float8_e4m3fn: 256, torch.bfloat16: 512, torch.float16: 512}
"""Average pairs of an expert from which weights are decoded first, by the dtype that they are decoded to."""
INT4_FROM = 1024
"""Average pairs of an expert from which INT4 is decoded first; the sum of each group is then scaled."""
LARGE_FROM = {torch.float8_e4m3fn: 512, torch.bfloat16: 192, torch.float16: 192}
"""Average pairs of an expert from which the larger block is used, by the dtype of the operands.

These, and the configurations for wgmma, follow times on an H100 (docs/architecture.md)."""

_CONFIGS = {
    # matrix instruction: operands of 16 bits and of 8, and both again where partial sums are scaled; ascending by pairs in a block
    "mma.sync": (
        (KernelConfig(128, 64, 64, 4, 3), KernelConfig(128, 128, 64, 8, 3)),
        (KernelConfig(128, 64, 128, 4, 3), KernelConfig(128, 128, 128, 8, 3)),
        (KernelConfig(128, 64, 64, 4, 3), KernelConfig(128, 128, 64, 8, 3)),
        (KernelConfig(128, 64, 128, 4, 3), KernelConfig(128, 128, 64, 8, 3)),
    ),
    "wgmma": (
        (KernelConfig(256, 64, 64, 4, 4), KernelConfig(256, 128, 64, 8, 4)),
        (KernelConfig(256, 64, 128, 8, 3), KernelConfig(128, 128, 128, 8, 4)),
        (KernelConfig(128, 64, 64, 4, 4), KernelConfig(128, 128, 128, 8, 3)),
        (KernelConfig(128, 64, 128, 4, 3), KernelConfig(128, 128, 128, 8, 3)),
    ),
    "tcgen05": (
        (KernelConfig(256, 64, 64, 4, 4), KernelConfig(256, 128, 64, 8, 4)),
        (KernelConfig(256, 64, 128, 8, 3), KernelConfig(256, 128, 128, 8, 4)),
        (KernelConfig(128, 64, 64, 4, 4), KernelConfig(128, 128, 128, 8, 3)),
        (KernelConfig(128, 64, 128, 4, 3), KernelConfig(128, 128, 128, 8, 3)),
    ),
}
"""Except for wgmma not timed on any GPU: those that compile without spilling (``benchmarks.aot``)."""


def takes_dense(weight: GroupedWeight, dtype: torch.dtype, pairs: int, capability: int) -> bool:
    """Return whether the dense product runs for ``pairs`` pairs and activations of ``dtype``: by dtypes and sizes alone."""
    if weight.kind == "mxfp4":
        return False
    operand = operand_of(weight, dtype, torch.bfloat16, capability)
    if _in_place(weight, operand):
        return pairs > WHOLE_ABOVE * weight.experts
    return pairs >= (INT4_FROM if weight.kind == "int4_float" else DECODED_FROM[operand]) * weight.experts


def dense_block(weight: GroupedWeight, dtype: torch.dtype, pairs: int, capability: int) -> int:
    """Return the pairs in a block of the dense product, by dtypes and sizes alone."""
    operand = operand_of(weight, dtype, torch.bfloat16, capability)
    small, large = configs(operand, False, capability)
    return (large if pairs >= LARGE_FROM[operand] * weight.experts else small).bm


def configs(dtype: torch.dtype, scaled: bool, capability: int) -> tuple[KernelConfig, KernelConfig]:
    """Return the configurations for operands of ``dtype`` on compute capability ``capability`` (times ten): smaller block first."""
    return _CONFIGS[matrix_instruction(capability)][2 * scaled + (dtype == torch.float8_e4m3fn)]


def _in_place(weight: GroupedWeight, operand: torch.dtype) -> bool:
    """Return whether the codes are multiplied as stored."""
    return weight.codes.dtype == operand and weight.scale is None


def run_dense(
    x: torch.Tensor,
    weight: GroupedWeight,
    routed: Routed,
    pairs: int,
    row_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: KernelConfig | None = None,
    scratch_bytes: int | None = None,
) -> torch.Tensor:
    """Multiply in dense tiles; arguments of :func:`grouped_linear`, and ``config`` instead of the choice by dtype and block.

    Weights that do not have the operands' dtype are decoded part by part into a buffer of at most ``scratch_bytes``; None for
    SCRATCH_BYTES.

    Raises:
        ValueError: the weights are for another matrix instruction, or no configuration has blocks as the pairs were sorted in.
    """
    if weight.kind == "mxfp4":
        raise ValueError("mxfp4 weights have no dense product")
    capability = machine(x.device)[0]
    dtype = operand_of(weight, x.dtype, out_dtype, capability)
    scaled = weight.kind in ("int4_float", "e4m3_float")
    known = (config,) if config else configs(dtype, scaled, capability)
    config = next((one for one in known if one.bm == routed.block), None)
    if config is None:
        raise ValueError(f"the dense product has no blocks of {routed.block} pairs")
    values = x.to(dtype).contiguous()
    y = torch.empty((pairs, weight.n), dtype=out_dtype, device=x.device)
    blocks = routed.owner.shape[0]
    for part, unit in _decoded(weight, dtype, routed, SCRATCH_BYTES if scratch_bytes is None else scratch_bytes):
        scale = block_scales(weight, part)
        checked(
            dense_kernel[(blocks * triton.cdiv(part.shape[1], config.bn),)](
                values,
                unit,
                # A pointer stands for an absent tensor; the kernel never reads through it.
                weight.out_scale if scale is None else scale,
                routed.pairs,
                routed.owner,
                routed.first,
                weight.out_scale if row_scale is None else row_scale.contiguous(),
                weight.out_scale[:, part.rows.start :],
                y[:, part.rows.start :],
                pairs,
                pairs // x.shape[0],
                weight.experts,
                part.experts.start,
                # Pairs of invalid experts belong to the last part.
                part.experts.stop + (part.experts.stop == weight.experts),
                part.shape[1],
                weight.n,
                weight.k,
                GROUP=0 if scale is None else weight.group,
                FP8=dtype == torch.float8_e4m3fn,
                ASM=x.is_cuda,
                DESCALE=divisor(weight, dtype),
                HAS_ROW_SCALE=row_scale is not None,
                NARROW=values.numel() < 1 << 31,
                EVEN_K=weight.k % config.bk == 0,
                STRIPE=STRIPE,
                BN=config.bn,
                BM=config.bm,
                BK=config.bk,
                num_warps=config.warps,
                num_stages=config.stages,
            )
        )
    return y


def _decoded(
    weight: GroupedWeight, dtype: torch.dtype, routed: Routed, scratch_bytes: int
) -> Iterator[tuple[Part, torch.Tensor]]:
    """Yield the unit weight in parts: itself where it has ``dtype``, else part after part decoded into the same memory."""
    if _in_place(weight, dtype):
        yield Part(slice(0, weight.experts), slice(0, weight.n)), weight.codes
        return
    every = list(parts(weight.experts, weight.n, weight.k, dtype.itemsize, scratch_bytes))
    most = max(experts * rows for experts, rows in (part.shape for part in every))
    scratch = torch.empty(most * weight.k, dtype=dtype, device=weight.codes.device)
    for part in every:
        yield part, decode_experts(weight, part, routed, scratch)
