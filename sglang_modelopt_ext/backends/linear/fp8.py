"""FP8 weights that stay FP8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_modelopt_ext.backends.base import (
    Backend,
    LinearRequest,
    ShardWeight,
    check_type,
    fp8_objection,
    merge_decoded,
)
from sglang_modelopt_ext.backends.linear.dense import DenseWeight
from sglang_modelopt_kernels.formats.fp8 import FP8
from sglang_modelopt_kernels.gemm.fp8 import fp8_linear
from sglang_modelopt_kernels.gemm.reference import prepare_dense
from sglang_modelopt_kernels.gemm.w8_decode import rows_of, whole


@dataclass(frozen=True)
class Fp8Weight(DenseWeight):
    """A weight on E4M3's grid.

    Attributes:
        uniform: whether all of ``out_scale`` are equal, as in a layer with one scale.
    """

    uniform: bool = False


class Fp8(Backend[Fp8Weight]):
    """FP8 weights and activations in FP8 matrix instructions: :mod:`sglang_modelopt_kernels.gemm.fp8`."""

    name = "fp8_scaled_mm"
    takes_vocabulary = True

    def objection(self, request: LinearRequest) -> str | None:
        """Reject all but weights on E4M3's grid under scales of rows, with FP8 activations, on GPUs from SM89."""
        scheme = request.scheme
        if not request.target.at_least(89):
            return "is for GPUs from SM89"
        if request.math != "fp8" and scheme.weight.number_type != FP8:
            return f"{scheme.weight} weights are not E4M3 values under a scale for each row"
        if request.k % 16 or request.n % 16:
            return f"needs N and K in 16s, not {request.n} and {request.k}"
        return fp8_objection(request)

    def operand(self, request: LinearRequest) -> torch.dtype:
        """Return E4M3."""
        del request
        return torch.float8_e4m3fn

    def prepare(self, shards: Sequence[ShardWeight]) -> Fp8Weight:
        """Merge the shards as E4M3. Raises ValueError for other weights, or rows that are not a multiple of 16."""
        if shards[0].math != "fp8":
            check_type(shards, (FP8,))
        unit, out_scale = prepare_dense(merge_decoded(shards), torch.float8_e4m3fn)
        if unit.shape[0] % 16:
            raise ValueError(f"{unit.shape[0]} rows of shards that share a product are not a multiple of 16")
        return Fp8Weight(unit, out_scale, uniform=bool((out_scale == out_scale[0]).all()))

    def matmul(
        self,
        weight: Fp8Weight,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """See :func:`fp8_linear`."""
        return fp8_linear(values, row_scale, weight.unit, weight.out_scale, bias, out_dtype, weight.uniform)

    def rows(self, weight: Fp8Weight, indices: torch.Tensor) -> torch.Tensor:
        """See :func:`rows_of`."""
        return rows_of(whole(weight.unit, weight.out_scale), indices)
