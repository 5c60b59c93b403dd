"""Where the dense product takes over, its configurations, and its launches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from sglang_modelopt_kernels.gemm.block_scaled.launch import SCRATCH_BYTES
from sglang_modelopt_kernels.gemm.tile import KernelConfig, machine, matrix_instruction
from sglang_modelopt_kernels.moe.route import Routed

from ..weights import GroupedWeight, Kind
from .decode import Part, block_scales, decode_experts, divisor, operand_of, parts
from .kernel import dense_kernel

BLOCK = 128
"""Pairs to a block."""
STRIPE = 8
"""Blocks that share a weight tile while it is in the cache."""
WHOLE_FROM = 64
"""Pairs to an expert, on average, from which weights are multiplied in blocks of BLOCK pairs that need no decoding."""
DECODED_FROM = 128
"""Likewise where they are decoded first, which moves as many bytes as a bf16 weight has once more.

Both predicted, not measured."""

_CONFIGS = {
    # matrix instruction: for operands of 16 bits and of 8, and for either where partial sums are scaled
    "mma.sync": (
        KernelConfig(128, BLOCK, 64, 8, 3),
        KernelConfig(128, BLOCK, 128, 8, 3),
        KernelConfig(128, BLOCK, 64, 8, 3),
    ),
    "wgmma": (
        KernelConfig(256, BLOCK, 64, 8, 4),
        KernelConfig(128, BLOCK, 128, 8, 4),
        KernelConfig(128, BLOCK, 128, 8, 3),
    ),
    "tcgen05": (
        KernelConfig(256, BLOCK, 64, 8, 4),
        KernelConfig(256, BLOCK, 128, 8, 4),
        KernelConfig(128, BLOCK, 128, 8, 3),
    ),
}
"""Not timed on any GPU: chosen by what compiles ahead of time without spilling (``benchmarks.aot``)."""


def takes_dense(kind: Kind, pairs: int, experts: int) -> bool:
    """Whether the dense product serves that many pairs: a function of the sizes alone."""
    if kind == "mxfp4":
        return False
    return pairs >= (WHOLE_FROM if kind in ("bf16", "e4m3") else DECODED_FROM) * experts


def config_of(dtype: torch.dtype, scaled: bool, capability: int) -> KernelConfig:
    """The configuration for operands of ``dtype`` on compute capability ``capability`` (times ten)."""
    wide, narrow, promoted = _CONFIGS[matrix_instruction(capability)]
    return promoted if scaled else narrow if dtype == torch.float8_e4m3fn else wide


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
    """The product in dense tiles; arguments as :func:`grouped_linear`, ``config`` instead of the one chosen by type.

    Weights that are not of the operands' type are decoded part by part into a buffer of at most ``scratch_bytes``, or for None
    SCRATCH_BYTES.

    Raises:
        ValueError: the weights are for another matrix instruction, or the pairs were sorted in blocks of another size.
    """
    if weight.kind == "mxfp4":
        raise ValueError("mxfp4 weights have no dense product")
    capability, processors = machine(x.device)
    dtype = operand_of(weight, x.dtype, out_dtype, capability)
    scaled = weight.kind in ("int4_float", "e4m3_float")
    config = config or config_of(dtype, scaled, capability)
    if routed.block != config.bm:
        raise ValueError(f"the dense product has blocks of {config.bm} pairs, not {routed.block}")
    values = x.to(dtype).contiguous()
    y = torch.empty((pairs, weight.n), dtype=out_dtype, device=x.device)
    blocks = routed.owner.shape[0]
    for part, unit in _decoded(weight, dtype, SCRATCH_BYTES if scratch_bytes is None else scratch_bytes):
        scale = block_scales(weight, part)
        most = blocks * triton.cdiv(part.shape[1], config.bn)
        dense_kernel[(min(most, processors) if config.persistent else most,)](
            values,
            unit,
            # The kernel takes a pointer for what is absent and never reads through it.
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
            # Pairs that none of the experts serves go with the last.
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
            PERSISTENT=config.persistent,
            STRIPE=STRIPE,
            BN=config.bn,
            BM=config.bm,
            BK=config.bk,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return y


def _decoded(weight: GroupedWeight, dtype: torch.dtype, scratch_bytes: int) -> Iterator[tuple[Part, torch.Tensor]]:
    """The unit weight in parts: itself where it is of ``dtype``, else one part after the other in the same memory."""
    if weight.codes.dtype == dtype and weight.scale is None:
        yield Part(slice(0, weight.experts), slice(0, weight.n)), weight.codes
        return
    every = list(parts(weight.experts, weight.n, weight.k, dtype.itemsize, scratch_bytes))
    most = max(experts * rows for experts, rows in (part.shape for part in every))
    scratch = torch.empty(most * weight.k, dtype=dtype, device=weight.codes.device)
    for part in every:
        yield part, decode_experts(weight, part, scratch)
