"""8-bit weights that stay 8-bit, where no FP8 matrix instruction reads them as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from sglang_modelopt_ext.backends.base import (
    Backend,
    LinearRequest,
    ShardWeight,
    check_type,
    exact_float,
    merge_decoded,
    output_scales,
)
from sglang_modelopt_ext.backends.tokens import covering
from sglang_modelopt_kernels.formats.fp8 import FP8
from sglang_modelopt_kernels.formats.int8 import INT8
from sglang_modelopt_kernels.formats.mxfp8 import MXFP8
from sglang_modelopt_kernels.gemm import w8_decode
from sglang_modelopt_kernels.gemm.reference import prepare_dense
from sglang_modelopt_kernels.gemm.w8_decode import MOST_INPUTS_INT8, ByteWeight
from sglang_modelopt_kernels.gemm.w8_decode.launch import TAKEN
from sglang_modelopt_kernels.gemm.w8_decode.packing import KIND_OF, Kind

ACTIVATIONS = (FP8, MXFP8, INT8)
"""The number types of activations whose products with decoded weights were tested."""


class EightBit(Backend[ByteWeight]):
    """8-bit weights decoded in registers, or INT8 on both sides: :mod:`sglang_modelopt_kernels.gemm.w8_decode`."""

    name = "triton_eight_bit"
    kernels = ("byte_decode_kernel", "eight_bit_kernel", "finish_kernel")
    takes_vocabulary = True

    def objection(self, request: LinearRequest) -> str | None:
        """Reject all but 8-bit formats on GPUs from SM80, with activations that a type which the product takes holds exactly."""
        weight, activation = request.scheme.weight, request.scheme.activation
        if not request.target.at_least(80):
            return "is for GPUs from SM80"
        kind = _kind(request)
        if kind is None:
            return f"does not read {weight} weights"
        if activation is None and request.dtype not in (torch.float16, torch.bfloat16):
            return f"does not take unrounded activations in {request.dtype}"
        if activation is not None and activation.number_type not in ACTIVATIONS:
            return f"does not take {activation} activations"
        operand = self.operand(request)
        if operand not in TAKEN[kind]:
            return f"does not multiply {weight} weights by activations in {operand}"
        if operand == torch.int8 and request.k > MOST_INPUTS_INT8:
            return f"sums at most {MOST_INPUTS_INT8} products of int8, not {request.k}"
        if request.k % 16:
            return f"needs K in 16s, not {request.k}"
        return None

    def operand(self, request: LinearRequest) -> torch.dtype:
        """Return the type of the activations' values: int8 for INT8, float16 for E4M3, bf16 for MXFP8, or the model's."""
        activation = request.scheme.activation
        if activation is None:
            return request.dtype
        return torch.int8 if activation.number_type == INT8 else exact_float(activation)

    def prepare(self, shards: Sequence[ShardWeight]) -> ByteWeight:
        """Keep the shards as stored, MXFP8 scales relative to a row's largest. Raises ValueError if these are too far apart."""
        if shards[0].math == "fp8":
            return w8_decode.whole(*prepare_dense(merge_decoded(shards), torch.float8_e4m3fn))
        check_type(shards, KIND_OF)
        kind = KIND_OF[shards[0].format.number_type]
        stored = [(shard.tensors["weight"], shard.tensors["weight_scale"]) for shard in shards]
        out_scale = output_scales(shards)
        if kind == "e4m3_float":
            kept = w8_decode.float_blocks([(codes, scale.squeeze(3).squeeze(1)) for codes, scale in stored])
            return dataclasses.replace(kept, out_scale=kept.out_scale * out_scale)
        codes = torch.cat([part for part, _ in stored])
        if kind == "e4m3_exponent":
            kept = w8_decode.mxfp8(codes, torch.cat([scale for _, scale in stored]))
            return dataclasses.replace(kept, out_scale=kept.out_scale * out_scale)
        return w8_decode.whole(codes, out_scale)

    def matmul(
        self,
        weight: ByteWeight,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """See :func:`eight_bit_linear`."""
        y: torch.Tensor = w8_decode.eight_bit_linear(values, weight, row_scale, bias, out_dtype)
        return y

    def check_tokens(self, weight: ByteWeight, request: LinearRequest) -> tuple[int, ...]:
        """Return numbers of tokens for every launch and configuration of :func:`eight_bit_linear`."""
        operand = self.operand(request)
        return covering(lambda m: w8_decode.path_of(weight, m, operand, weight.codes.device))

    def rows(self, weight: ByteWeight, indices: torch.Tensor) -> torch.Tensor:
        """See :func:`rows_of`."""
        return w8_decode.rows_of(weight, indices)


def _kind(request: LinearRequest) -> Kind | None:
    return "e4m3" if request.math == "fp8" else KIND_OF.get(request.scheme.weight.number_type)
