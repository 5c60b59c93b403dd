"""FP4 weights and activations on Blackwell."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_modelopt_ext.backends.base import (
    BlockBackend,
    BlockScaledWeight,
    LinearRequest,
    ShardWeight,
    check_type,
    describe_operands,
    output_scales,
    type_objection,
)
from sglang_modelopt_ext.backends.tokens import covering
from sglang_modelopt_kernels.formats import e4m3, ue8m0
from sglang_modelopt_kernels.formats.base import BlockActivation
from sglang_modelopt_kernels.formats.mxfp4 import MXFP4
from sglang_modelopt_kernels.formats.nvfp4 import NVFP4
from sglang_modelopt_kernels.gemm.blackwell_common import takes_tiles
from sglang_modelopt_kernels.gemm.fp4_blackwell import fp4_linear, path_of
from sglang_modelopt_kernels.quantize.blocks import naive_swizzle, rounds

TYPES = (NVFP4, MXFP4)
"""The number types that FP4 matrix instructions read, on both sides alike."""


class Fp4(BlockBackend[BlockScaledWeight]):
    """Weights as stored times activations of the same format: :mod:`sglang_modelopt_kernels.gemm.fp4_blackwell`."""

    architectures: tuple[str, ...]
    """The GPUs it is for."""
    weight_swizzled: bool
    """Whether it keeps the weight's block scales swizzled (:func:`naive_swizzle`)."""

    def objection(self, request: LinearRequest) -> str | None:
        """Reject all but NVFP4 in blocks of 16 on both sides, or MXFP4 on both sides, on its architectures."""
        scheme, activation = request.scheme, request.scheme.activation
        if request.target.name not in self.architectures:
            return f"is for {' and '.join(self.architectures)}"
        if (reason := type_objection(scheme, TYPES)) is not None:
            return reason
        if activation is None or activation.number_type != scheme.weight.number_type or not rounds(activation):
            return f"has no matrix instruction for {describe_operands(scheme)}"
        if request.dtype not in (torch.float16, torch.bfloat16):
            return f"may sum at less than the precision of {request.dtype}"
        return None

    def prepare(self, shards: Sequence[ShardWeight]) -> BlockScaledWeight:
        """Keep ``codes`` uint8 ``[N, K / 2]``, ``block_scale`` ``[N, K / group]`` and ``out_scale`` float32 ``[N]``.

        ``block_scale`` is swizzled where :attr:`weight_swizzled` is True.
        """
        check_type(shards, TYPES)
        codes = torch.cat([shard.tensors["weight"] for shard in shards])
        scale = torch.cat([shard.tensors["weight_scale"] for shard in shards])
        # The instruction reads E4M3 scales without their sign.
        if scale.dtype == torch.uint8:
            illegal = ue8m0.byte_is_nan(scale)
        else:
            illegal = e4m3.byte_is_nan(scale) | e4m3.byte_is_negative(scale)
        if bool(illegal.any()):
            raise ValueError("a block scale is NaN or negative")
        kept = naive_swizzle(scale) if self.weight_swizzled else scale
        return BlockScaledWeight(codes, kept, output_scales(shards))

    def matmul_blocks(
        self,
        weight: BlockScaledWeight,
        x: BlockActivation,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """See :func:`fp4_linear`."""
        kept = weight.codes, weight.block_scale, weight.out_scale
        y: torch.Tensor = fp4_linear(x, *kept, bias, out_dtype, self.weight_swizzled)
        return y

    def check_tokens(self, weight: BlockScaledWeight, request: LinearRequest) -> tuple[int, ...]:
        """Return numbers of tokens for every launch and configuration of :func:`fp4_linear`."""
        del request
        (n, half), device = weight.codes.shape, weight.codes.device
        return covering(lambda m: path_of(self.weight_swizzled, m, n, 2 * half, device))


class BlackwellFp4(Fp4):
    """NVFP4 or MXFP4 on both sides in FP4 matrix instructions of SM100 and SM103, with swizzled block scales.

    ``tcgen05.cp`` copies them to tensor memory; those of the activations are swizzled from 65 tokens on.
    """

    name = "triton_fp4_tcgen05"
    kernels = ("tcgen05_kernel",)
    architectures = ("SM100", "SM103")
    weight_swizzled = True

    def swizzles(self, tokens: int) -> bool:
        """Return whether a tile of the product has as many tokens as a tile of scales."""
        return takes_tiles(tokens)


class MmaFp4(Fp4):
    """NVFP4 or MXFP4 on both sides in FP4 matrix instructions of SM120, with block scales in rows.

    ``mma.sync`` takes them from registers.
    """

    name = "triton_fp4_mma"
    kernels = ("fp4_kernel",)
    architectures = ("SM120", "SM121")
    weight_swizzled = False
