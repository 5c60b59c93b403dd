"""8-bit weights that stay 8-bit, where no FP8 matrix instruction reads them as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sglang_modelopt_ext.backends.base import FP8_ACTIVATIONS, Backend, LinearRequest, ShardWeight, merge_decoded
from sglang_modelopt_ext.backends.tokens import covering
from sglang_modelopt_kernels.gemm import w8_decode
from sglang_modelopt_kernels.gemm.reference import prepare_dense
from sglang_modelopt_kernels.gemm.w8_decode import MOST_INPUTS_INT8, ByteWeight
from sglang_modelopt_kernels.gemm.w8_decode.launch import TAKEN
from sglang_modelopt_kernels.gemm.w8_decode.packing import Kind

KINDS: dict[str, Kind] = {
    "fp8": "e4m3",
    "fp8_per_channel": "e4m3",
    "fp8_block": "e4m3_float",
    "mxfp8": "e4m3_exponent",
    "int8_per_channel": "int8",
}
"""How each weight format is kept."""


class EightBit(Backend):
    """8-bit codes as stored, decoded in registers, or INT8 times INT8: :mod:`sglang_modelopt_kernels.gemm.w8_decode`."""

    name = "triton_eight_bit"
    kernels = ("byte_decode_kernel", "eight_bit_kernel", "finish_kernel")
    takes_vocabulary = True

    def objection(self, request: LinearRequest) -> str | None:
        """8-bit formats on GPUs from SM80, with activations that a type which the product takes holds exactly."""
        weight, activation = request.scheme.weight, request.scheme.activation
        if request.device != "cuda" or (request.capability or 0) < 80:
            return "is for GPUs from SM80"
        kind = _kind(request)
        if kind is None:
            return f"does not read {weight.name} weights"
        if activation is None and request.dtype not in (torch.float16, torch.bfloat16):
            return f"does not take unrounded activations in {request.dtype}"
        if activation is not None and activation.name not in (*FP8_ACTIVATIONS, "mxfp8_dynamic", "int8_static"):
            return f"does not take {activation.name} activations"
        operand = self.operand(request)
        if operand not in TAKEN[kind]:
            return f"does not multiply {weight.name} weights by activations in {operand}"
        if operand == torch.int8 and request.k > MOST_INPUTS_INT8:
            return f"sums at most {MOST_INPUTS_INT8} products of int8, not {request.k}"
        if request.k % 16:
            return f"needs K in 16s, not {request.k}"
        return None

    def operand(self, request: LinearRequest) -> torch.dtype:
        """The type of the activations' numbers: int8 for INT8, float16 for E4M3, bf16 for MXFP8, or the model's."""
        activation = request.scheme.activation
        if activation is None:
            return request.dtype
        return {"int8_static": torch.int8, "mxfp8_dynamic": torch.bfloat16}.get(activation.name, torch.float16)

    def prepare(self, shards: Sequence[ShardWeight]) -> dict[str, torch.Tensor]:
        """``codes`` int8 or E4M3 ``[N, K]``, ``block_scale`` where the format has one, and ``out_scale`` float32 ``[N]``."""
        return w8_decode.to_tensors(_keep(shards))

    def matmul(
        self,
        prepared: Mapping[str, torch.Tensor],
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """See :func:`eight_bit_linear`."""
        weight = w8_decode.from_tensors(prepared)
        y: torch.Tensor = w8_decode.eight_bit_linear(values, weight, row_scale, bias, out_dtype)
        return y

    def check_tokens(self, prepared: Mapping[str, torch.Tensor], request: LinearRequest) -> tuple[int, ...]:
        """Return numbers of tokens for every launch and configuration of :func:`eight_bit_linear`."""
        weight, operand = w8_decode.from_tensors(prepared), self.operand(request)
        return covering(lambda m: w8_decode.path_of(weight, m, operand, weight.codes.device))

    def rows(self, prepared: Mapping[str, torch.Tensor], indices: torch.Tensor) -> torch.Tensor:
        """See :func:`rows_of`."""
        return w8_decode.rows_of(w8_decode.from_tensors(prepared), indices)


def _kind(request: LinearRequest) -> Kind | None:
    return "e4m3" if request.math == "fp8" else KINDS.get(request.scheme.weight.name)


def _keep(shards: Sequence[ShardWeight]) -> ByteWeight:
    """The shards as stored, but for MXFP8 scales, which become relative to a row's largest. Raises ValueError if too far apart."""
    if shards[0].math == "fp8":
        return w8_decode.whole(*prepare_dense(merge_decoded(shards), torch.float8_e4m3fn))
    kind = KINDS[shards[0].format.name]
    stored = [(shard.tensors["weight"], shard.tensors["weight_scale"]) for shard in shards]
    if kind == "e4m3_float":
        return w8_decode.float_blocks([(codes, scale.squeeze(3).squeeze(1)) for codes, scale in stored])
    codes = torch.cat([part for part, _ in stored])
    if kind == "e4m3_exponent":
        return w8_decode.mxfp8(codes, torch.cat([scale for _, scale in stored]))
    # One scale for each row, or for all of a shard.
    scales = [scale.to(torch.float32).reshape(-1).expand(part.shape[0]) for part, scale in stored]
    return w8_decode.whole(codes, torch.cat(scales))
