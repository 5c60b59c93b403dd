"""MXFP4 weights in FP8 matrix instructions before Blackwell."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_modelopt_ext.backends.base import (
    Backend,
    LinearRequest,
    ShardWeight,
    check_type,
    fp8_objection,
    output_scales,
    type_objection,
)
from sglang_modelopt_ext.backends.tokens import covering
from sglang_modelopt_kernels.formats.mxfp4 import MXFP4
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import FoldedWeight, fold, folded_linear, path_of


def fold_shards(shards: Sequence[ShardWeight]) -> FoldedWeight:
    """Fold MXFP4 shards, one below the other; see :func:`fold`. Raises ValueError for another type, or what cannot be folded."""
    check_type(shards, (MXFP4,))
    parts = [fold(shard.tensors["weight"], shard.tensors["weight_scale"]) for shard in shards]
    return FoldedWeight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.exponent for part in parts]),
        torch.cat([part.out_scale for part in parts]) * output_scales(shards),
    )


class FoldedMxfp4(Backend[FoldedWeight]):
    """MXFP4 weights folded to E4M3 in registers, for FP8 instructions: :mod:`sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper`."""

    name = "triton_mxfp4_folded"
    kernels = ("folded_kernel", "unfold_kernel")

    def objection(self, request: LinearRequest) -> str | None:
        """Reject all but MXFP4 weights with FP8 activations on SM89 and SM90."""
        if not request.target.is_one_of(89, 90):
            return "is for SM89 and SM90"
        if (reason := type_objection(request.scheme, (MXFP4,))) is not None:
            return reason
        return fp8_objection(request)

    def operand(self, request: LinearRequest) -> torch.dtype:
        """Return E4M3."""
        del request
        return torch.float8_e4m3fn

    def prepare(self, shards: Sequence[ShardWeight]) -> FoldedWeight:
        """Fold the shards' exponents; see :func:`fold`."""
        return fold_shards(shards)

    def matmul(
        self,
        weight: FoldedWeight,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """See :func:`folded_linear`."""
        y: torch.Tensor = folded_linear(values, weight, row_scale, bias, out_dtype)
        return y

    def check_tokens(self, weight: FoldedWeight, request: LinearRequest) -> tuple[int, ...]:
        """Return numbers of tokens for every launch and configuration of :func:`folded_linear`."""
        del request
        return covering(lambda m: path_of(weight, m, weight.codes.device))
