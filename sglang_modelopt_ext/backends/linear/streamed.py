"""4-bit weights that are fetched before the kernels ahead have ended, on Hopper."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_modelopt_ext.backends.base import (
    Backend,
    LinearRequest,
    ShardWeight,
    fp8_objection,
    is_fp8,
    merge_blocks,
    type_objection,
)
from sglang_modelopt_ext.backends.linear.mxfp4_hopper import fold_shards
from sglang_modelopt_ext.backends.tokens import covering
from sglang_modelopt_kernels.formats.mxfp4 import MXFP4
from sglang_modelopt_kernels.formats.nvfp4 import NVFP4, NVFP4_BLOCK32
from sglang_modelopt_kernels.gemm.w4_stream import (
    StreamedWeight,
    missing,
    path_of,
    stream_folded,
    stream_nvfp4,
    streamed_linear,
)
from sglang_modelopt_kernels.gemm.w4_stream.launch import operand
from sglang_modelopt_kernels.gemm.w4_stream.packing import ROWS, WIDTH


def stream_objection(request: LinearRequest) -> str | None:
    """Return why tiles of 4-bit weights do not serve ``request``, by types, sizes and numerics; None when they do."""
    if (reason := type_objection(request.scheme, (MXFP4, NVFP4, NVFP4_BLOCK32))) is not None:
        return reason
    if request.n % ROWS or request.k % WIDTH:
        return f"needs N in {ROWS}s and K in {WIDTH}s, not {request.n} x {request.k}"
    if request.scheme.weight.number_type == MXFP4:
        return fp8_objection(request)
    if not is_fp8(request.scheme.activation):
        return f"needs FP8 activations, not {request.scheme.activation or 'unrounded'}"
    return None if request.math == "exact" else f"does not round weights as math {request.math} does"


def stream_operand(request: LinearRequest) -> torch.dtype:
    """Return the type of activations: E4M3 beside MXFP4, float16 beside NVFP4."""
    return operand("folded" if request.scheme.weight.number_type == MXFP4 else "scaled_16")


def stream_shards(shards: Sequence[ShardWeight]) -> StreamedWeight:
    """Put shards into tiles, one below the other; see :func:`stream_folded` and :func:`stream_nvfp4`."""
    if shards[0].format.number_type != MXFP4:
        return stream_nvfp4(merge_blocks(shards))
    return stream_folded(fold_shards(shards))


class Streamed(Backend[StreamedWeight]):
    """MXFP4 and NVFP4 weights, whose copies begin before their input is there: :mod:`sglang_modelopt_kernels.gemm.w4_stream`."""

    name = "gluon_streamed"
    kernels = ("streamed_kernel", "unstream_kernel", "finish_kernel")
    interpreted = False

    def objection(self, request: LinearRequest) -> str | None:
        """Reject all but MXFP4 and NVFP4 weights of whole tiles with FP8 activations, on SM90 with Triton's Gluon."""
        if not request.target.is_one_of(90):
            return "is for SM90"
        return missing() or stream_objection(request)

    def operand(self, request: LinearRequest) -> torch.dtype:
        """Return E4M3 beside MXFP4, float16 beside NVFP4."""
        return stream_operand(request)

    def prepare(self, shards: Sequence[ShardWeight]) -> StreamedWeight:
        """Put the shards into tiles, one below the other."""
        return stream_shards(shards)

    def matmul(
        self,
        weight: StreamedWeight,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """See :func:`streamed_linear`."""
        y: torch.Tensor = streamed_linear(values, weight, row_scale, bias, out_dtype)
        return y

    def check_tokens(self, weight: StreamedWeight, request: LinearRequest) -> tuple[int, ...]:
        """Return numbers of tokens for every launch and configuration of :func:`streamed_linear`."""
        del request
        return covering(lambda m: path_of(weight, m, weight.codes.device))
