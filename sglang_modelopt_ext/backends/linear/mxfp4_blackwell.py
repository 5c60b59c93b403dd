"""MXFP4 weights on Blackwell."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_modelopt_ext.backends.base import (
    Backend,
    BlockScaledWeight,
    LinearRequest,
    ShardWeight,
    check_type,
    fp8_objection,
    output_scales,
    type_objection,
)
from sglang_modelopt_ext.backends.tokens import covering
from sglang_modelopt_kernels.formats import ue8m0
from sglang_modelopt_kernels.formats.mxfp4 import MXFP4
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell import mxfp4_linear, pair_blocks, path_of
from sglang_modelopt_kernels.quantize.blocks import naive_swizzle


class Mxfp4(Backend[BlockScaledWeight]):
    """MXFP4 weights with FP8 activations in block-scaled instructions: :mod:`sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell`."""

    architectures: tuple[str, ...]
    """The GPUs it is for."""
    paired: bool
    """Whether it keeps the codes as :func:`pair_blocks` has them."""

    def objection(self, request: LinearRequest) -> str | None:
        """Reject all but MXFP4 weights with FP8 activations on its architectures, under pairs of blocks where it pairs them."""
        if request.target.name not in self.architectures:
            return f"is for {' and '.join(self.architectures)}"
        if (reason := type_objection(request.scheme, (MXFP4,))) is not None:
            return reason
        if self.paired and request.k % 64:
            return f"needs K in 64s, not {request.k}"
        return fp8_objection(request)

    def operand(self, request: LinearRequest) -> torch.dtype:
        """Return E4M3."""
        del request
        return torch.float8_e4m3fn

    def prepare(self, shards: Sequence[ShardWeight]) -> BlockScaledWeight:
        """Keep ``codes`` uint8 ``[N, K / 2]``, ``block_scale`` uint8 ``[N, K / 32]`` and ``out_scale`` float32 ``[N]``.

        The scales are swizzled (:func:`naive_swizzle`) where the codes are not in pairs.
        """
        check_type(shards, (MXFP4,))
        stored = [shard.tensors["weight"] for shard in shards]
        codes = torch.cat([pair_blocks(part) for part in stored] if self.paired else stored)
        scale = torch.cat([shard.tensors["weight_scale"] for shard in shards])
        if bool(ue8m0.byte_is_nan(scale).any()):
            raise ValueError("a UE8M0 block scale is NaN")
        kept = scale if self.paired else naive_swizzle(scale)
        return BlockScaledWeight(codes, kept, output_scales(shards))

    def matmul(
        self,
        weight: BlockScaledWeight,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """See :func:`mxfp4_linear`."""
        kept = weight.codes, weight.block_scale, weight.out_scale
        y: torch.Tensor = mxfp4_linear(values, *kept, row_scale, bias, out_dtype, self.paired)
        return y

    def check_tokens(self, weight: BlockScaledWeight, request: LinearRequest) -> tuple[int, ...]:
        """Return numbers of tokens for every launch and configuration of :func:`mxfp4_linear`."""
        del request
        (n, half), device = weight.codes.shape, weight.codes.device
        return covering(lambda m: path_of(self.paired, m, n, 2 * half, device))


class BlackwellMxfp4(Mxfp4):
    """MXFP4 weights with FP8 activations in block-scaled matrix instructions of SM100 and SM103, codes as stored."""

    name = "triton_mxfp4_tcgen05"
    kernels = ("tcgen05_kernel",)
    architectures = ("SM100", "SM103")
    paired = False


class WidenedMxfp4(Mxfp4):
    """MXFP4 weights with FP8 activations in block-scaled matrix instructions of SM120, codes widened to E4M3 in registers.

    No instruction there mixes E2M1 and E4M3 operands.
    """

    name = "triton_mxfp4_mma"
    kernels = ("mxfp4_widened_kernel",)
    architectures = ("SM120", "SM121")
    paired = True
