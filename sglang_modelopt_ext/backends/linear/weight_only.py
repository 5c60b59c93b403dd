"""NVFP4 weights with bf16 activations in kernels of other packages that decode them in registers, exactly.

Both read blocks of 16; a block of 32 is two of them with one scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_modelopt_ext.backends.base import (
    Backend,
    BlockScaledWeight,
    LinearRequest,
    ShardWeight,
    check_type,
    describe_operands,
    one_scale,
)
from sglang_modelopt_ext.backends.linear.flashinfer import add_bias, check_rows, flashinfer_objection, stored
from sglang_modelopt_ext.backends.packages import package_objection
from sglang_modelopt_kernels.formats.nvfp4 import NVFP4, NVFP4_BLOCK32
from sglang_modelopt_kernels.quantize.blocks import naive_swizzle

TYPES = (NVFP4, NVFP4_BLOCK32)
"""The number types of weights that are whole blocks of 16."""


def weight_only_objection(request: LinearRequest) -> str | None:
    """Return why neither package serves ``request``, or None: NVFP4 weights, unrounded activations, bf16, no low-rank branch."""
    scheme = request.scheme
    if scheme.weight.number_type not in TYPES or scheme.activation is not None:
        return f"multiplies NVFP4 weights by unrounded activations only, not {describe_operands(scheme)}"
    if request.math != "exact":
        return f"does not round weights as math {request.math} does"
    if request.dtype != torch.bfloat16:
        return f"takes bf16 activations, not {request.dtype}"
    if scheme.low_rank:
        return "has no float32 output for a low-rank branch"
    if request.n % 64 or request.k % 64:
        return f"needs N and K in 64s, not {request.n} and {request.k}"
    return None


def blocks_of_16(shards: Sequence[ShardWeight]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the shards' codes uint8 ``[N, K / 2]`` and scales e4m3 ``[N, K / 16]``.

    Raises ValueError for weights that are not E2M1 in blocks of 16 or 32 under E4M3 scales.
    """
    check_type(shards, TYPES)
    codes = stored(shards, "weight")
    check_rows(codes.shape[0], 64)
    scale = stored(shards, "weight_scale").view(torch.uint8)
    repeated = scale.repeat_interleave(shards[0].format.group_size // 16, dim=1)
    return codes, repeated.view(torch.float8_e4m3fn).contiguous()


class FlashInferWeightOnly(Backend[BlockScaledWeight]):
    """NVFP4 weights with bf16 activations: ``flashinfer.mm_bf16_fp4``, its CuTe-DSL kernel for SM100 and SM103.

    Its kernel for SM120 multiplies in float16, which does not hold every bf16 activation, and is not used.
    """

    name = "flashinfer_mm_bf16_fp4"
    repeats = False  # not known

    def objection(self, request: LinearRequest) -> str | None:
        """See :func:`weight_only_objection`."""
        return weight_only_objection(request) or flashinfer_objection(request, (100, 103))

    def operand(self, request: LinearRequest) -> torch.dtype:
        """Return bf16."""
        del request
        return torch.bfloat16

    def prepare(self, shards: Sequence[ShardWeight]) -> BlockScaledWeight:
        """Keep ``codes`` and ``block_scale`` as ``prepare_bf16_fp4_weights`` returns them, and ``out_scale`` float32 ``[N]``."""
        codes, scale = blocks_of_16(shards)
        from flashinfer import prepare_bf16_fp4_weights

        alpha = one_scale(shards)
        swizzled = naive_swizzle(scale)
        codes, swizzled, kept = prepare_bf16_fp4_weights(codes, swizzled, alpha, backend="cute-dsl", block_size=16)
        if kept is not alpha:
            raise ValueError("prepare_bf16_fp4_weights changed the global scale")
        return BlockScaledWeight(codes, swizzled, alpha.expand(codes.shape[0]).contiguous())

    def matmul(
        self,
        weight: BlockScaledWeight,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Multiply; the sum is scaled by ``out_scale`` before it is rounded, by ``row_scale`` (of the self-test alone) after."""
        alpha = weight.out_scale[:1]
        y: torch.Tensor = _mm_bf16_fp4(values.contiguous(), weight.codes, weight.block_scale, alpha)
        return add_bias(scale_rows(y, row_scale), bias).to(out_dtype)


def scale_rows(y: torch.Tensor, row_scale: torch.Tensor | None) -> torch.Tensor:
    """Return ``y * row_scale`` in float32, rounded to the type of ``y``."""
    return y if row_scale is None else (y.to(torch.float32) * row_scale).to(y.dtype)


@torch.library.custom_op("modelopt_ext::flashinfer_mm_bf16_fp4", mutates_args=())
def _mm_bf16_fp4(x: torch.Tensor, codes: torch.Tensor, block_scale: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    from flashinfer import mm_bf16_fp4

    if x.shape[0] == 0:
        return x.new_empty((0, codes.shape[0]))
    return mm_bf16_fp4(x, codes, block_scale, alpha, backend="cute-dsl", out_dtype=torch.bfloat16, block_size=16)


@_mm_bf16_fp4.register_fake
def _(x: torch.Tensor, codes: torch.Tensor, block_scale: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    del block_scale, alpha
    return x.new_empty((x.shape[0], codes.shape[0]))


class QuackWeightOnly(Backend[BlockScaledWeight]):
    """NVFP4 weights with bf16 activations on SM90: ``quack.gemm_w4.gemm_w4a16``, format ``nvfp4``."""

    name = "quack_w4a16"
    repeats = False  # not known

    def objection(self, request: LinearRequest) -> str | None:
        """See :func:`weight_only_objection`; on SM90, the only architecture it is written for here."""
        reason = weight_only_objection(request)
        if reason is not None:
            return reason
        if not request.target.is_one_of(90):
            return "is for SM90"
        return package_objection("quack-kernels", request.packages)

    def operand(self, request: LinearRequest) -> torch.dtype:
        """Return bf16."""
        del request
        return torch.bfloat16

    def prepare(self, shards: Sequence[ShardWeight]) -> BlockScaledWeight:
        """Keep ``codes`` and ``block_scale`` as ``prepare_w4_weight`` returns them, N padded to 128s, and ``out_scale``."""
        codes, scale = blocks_of_16(shards)
        from quack.gemm_w4 import prepare_w4_weight

        alpha = one_scale(shards)
        blob, strip = prepare_w4_weight(codes, scale, wformat="nvfp4")
        return BlockScaledWeight(blob, strip, alpha.expand(codes.shape[0]).contiguous())

    def matmul(
        self,
        weight: BlockScaledWeight,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Multiply; the sum is scaled by ``out_scale`` before it is rounded, by ``row_scale`` (of the self-test alone) after."""
        kept, scale = (weight.codes, weight.block_scale), weight.out_scale
        y: torch.Tensor = _gemm_w4a16(values.contiguous(), *kept, scale[:1], scale.shape[0])
        return add_bias(scale_rows(y, row_scale), bias).to(out_dtype)


@torch.library.custom_op("modelopt_ext::quack_gemm_w4a16", mutates_args=())
def _gemm_w4a16(
    x: torch.Tensor, blob: torch.Tensor, strip: torch.Tensor, tensor_scale: torch.Tensor, n: int
) -> torch.Tensor:
    from quack.gemm_w4 import gemm_w4a16

    if x.shape[0] == 0:
        return x.new_empty((0, n))
    # A scale in device memory: a number would have to be read back from it.
    y = gemm_w4a16(x, blob, strip, tensor_scale=tensor_scale, n_out=n, wformat="nvfp4")
    return y.contiguous()


@_gemm_w4a16.register_fake
def _(x: torch.Tensor, blob: torch.Tensor, strip: torch.Tensor, tensor_scale: torch.Tensor, n: int) -> torch.Tensor:
    del blob, strip, tensor_scale
    return x.new_empty((x.shape[0], n))
