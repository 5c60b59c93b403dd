"""Experts on a GPU: one product for all of them, over their weights as they are or decoded in registers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch

from sglang_modelopt_ext.backends.base import (
    FP8_ACTIVATIONS,
    ShardWeight,
    fp8_objection,
    merge_blocks,
    merge_decoded,
)
from sglang_modelopt_ext.backends.experts.base import ExpertBackend, ExpertRequest, Routing
from sglang_modelopt_ext.backends.tokens import covering
from sglang_modelopt_kernels.gemm.reference import prepare_dense
from sglang_modelopt_kernels.gemm.w4_decode import pack
from sglang_modelopt_kernels.moe import grouped
from sglang_modelopt_kernels.moe.grouped import GroupedWeight
from sglang_modelopt_kernels.moe.grouped.launch import TAKEN
from sglang_modelopt_kernels.moe.grouped.weights import Kind
from sglang_modelopt_kernels.moe.route import Routed, route

FLOATS = (torch.float16, torch.bfloat16)


ACTIVATIONS = (*FP8_ACTIVATIONS, "nvfp4_dynamic", "mxfp4_dynamic", "mxfp8_dynamic", "int8_static")
KINDS: dict[str, Kind] = {
    "fp8": "e4m3",
    "fp8_per_channel": "e4m3",
    "fp8_block": "e4m3_float",
    "mxfp8": "e4m3_exponent",
    "int8_per_channel": "int8",
}
"""How weights without 4-bit blocks are kept."""


class GroupedExperts(ExpertBackend):
    """A product of :mod:`sglang_modelopt_kernels.moe.grouped`."""

    def prepare(self, experts: Sequence[Sequence[ShardWeight]]) -> dict[str, torch.Tensor]:
        """``codes`` and, where there is one, ``block_scale``, both ``[E, N, ...]``, and ``out_scale`` float32 ``[E, N]``."""
        return grouped.to_tensors(grouped.stack([self.keep(shards) for shards in experts]))

    def check_tokens(self, prepared: Mapping[str, torch.Tensor], request: ExpertRequest, top_k: int) -> tuple[int, ...]:
        """Return numbers of tokens for every launch and block size of :func:`grouped_linear`."""
        weight, operand = grouped.from_tensors(prepared), self.operand(request)
        return covering(lambda m: grouped.path_of(weight, m * top_k, operand))

    @abstractmethod
    def keep(self, shards: Sequence[ShardWeight]) -> GroupedWeight:
        """The weight of one expert. Raises ValueError when the backend cannot hold it."""

    def matmul(
        self,
        prepared: Mapping[str, torch.Tensor],
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        routing: Routing,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Multiply with :func:`grouped_linear`, with the rows sorted by expert once for all products of a pass."""
        weight = grouped.from_tensors(prepared)
        block = grouped.tile(weight, values.dtype, routing.rows)
        key = ("grouped", weight.experts, block)
        if key not in routing.derived:
            routing.derived[key] = route(routing.experts, weight.experts, block)
        routed: Routed = routing.derived[key]
        y: torch.Tensor = grouped.grouped_linear(values, weight, routed, routing.rows, row_scale, out_dtype)
        return y


class GroupedDecoded(GroupedExperts):
    """Every weight format, 4-bit ones decoded in registers, at the width they are stored in."""

    name = "triton_grouped"
    kernels = ("combine_kernel", "decode_kernel", "dense_kernel", "grouped_kernel", "route_kernel", "swiglu_kernel")

    def supports(self, request: ExpertRequest) -> str | None:
        """GPUs from SM80, with activations that a type which the product takes holds exactly."""
        weight, activation = request.scheme.weight, request.scheme.activation
        if request.device != "cuda" or (request.capability or 0) < 80:
            return "is for GPUs from SM80"
        if request.k % 16:
            return f"needs K in 16s, not {request.k}"
        if activation is None and request.dtype not in FLOATS:
            return f"does not take unrounded activations in {request.dtype}"
        if activation is not None and activation.name not in ACTIVATIONS:
            return f"does not take {activation.name} activations"
        kind = _kind(request)
        if kind is None:
            return f"does not read {weight.name} weights"
        operand = self.operand(request)
        if operand not in TAKEN[kind]:
            return f"does not multiply {weight.name} weights by activations in {operand}"
        return None

    def operand(self, request: ExpertRequest) -> torch.dtype:
        """The type of the activations' numbers: E4M3 where the GPU has it, float16 for NVFP4 and INT8, bf16 for MX formats.

        A float32 model gets float16 for E4M3 numbers: FP8 matrix instructions may sum at less than its precision.
        """
        activation = request.scheme.activation
        if activation is None:
            return request.dtype
        if activation.name in FP8_ACTIVATIONS and (request.capability or 0) >= 89 and request.dtype in FLOATS:
            return torch.float8_e4m3fn
        return torch.bfloat16 if activation.name in ("mxfp4_dynamic", "mxfp8_dynamic") else torch.float16

    def keep(self, shards: Sequence[ShardWeight]) -> GroupedWeight:
        """As stored, but for 4-bit codes, which are packed, and MXFP8 scales, which become relative to a row's largest."""
        number, math = shards[0].format, shards[0].math
        if number.has_blocks and math == "exact":
            return grouped.packed(pack(merge_blocks(shards)))
        if number.name == "mxfp8":
            codes, scale = (torch.cat([shard.tensors[name] for shard in shards]) for name in ("weight", "weight_scale"))
            return grouped.mxfp8(codes, scale)
        if number.name == "fp8_block":
            codes = torch.cat([shard.tensors["weight"] for shard in shards])
            return grouped.float_blocks(codes, torch.cat([_rows_of_blocks(shard) for shard in shards]))
        dtype = torch.int8 if number.name == "int8_per_channel" else torch.float8_e4m3fn
        return grouped.whole(*prepare_dense(merge_decoded(shards), dtype))


def _kind(request: ExpertRequest) -> Kind | None:
    """How :class:`GroupedDecoded` keeps the weights of ``request``; all kinds of 4-bit blocks take the same activations."""
    if request.math == "fp8":
        return "e4m3"
    weight = request.scheme.weight
    return "e2m1_e4m3" if weight.has_blocks else KINDS.get(weight.name)


def _rows_of_blocks(shard: ShardWeight) -> torch.Tensor:
    """The scales of 128 x 128 blocks for each row, float32 ``[N, ceil(K / 128)]``."""
    scale = shard.tensors["weight_scale"].to(torch.float32)
    rows = scale.reshape(scale.shape[0], -1).repeat_interleave(128, dim=0)
    return rows[: shard.tensors["weight"].shape[0]].contiguous()


class GroupedMxfp4(GroupedExperts):
    """MXFP4 weights as stored, in Blackwell's block-scaled matrix instructions."""

    name = "triton_grouped_mxfp4_tcgen05"
    kernels = ("combine_kernel", "grouped_kernel", "route_kernel", "swiglu_kernel")

    def supports(self, request: ExpertRequest) -> str | None:
        """MXFP4 weights with FP8 activations on SM100 and SM103."""
        if request.device != "cuda" or not 100 <= (request.capability or 0) < 110:
            return "is for SM100 and SM103"
        if request.scheme.weight.name != "mxfp4":
            return f"{request.scheme.weight.name} weights have no UE8M0 block scales over E2M1 codes"
        return fp8_objection(request)

    def operand(self, request: ExpertRequest) -> torch.dtype:
        """Return E4M3."""
        del request
        return torch.float8_e4m3fn

    def keep(self, shards: Sequence[ShardWeight]) -> GroupedWeight:
        """As stored."""
        codes, scale = (torch.cat([shard.tensors[name] for shard in shards]) for name in ("weight", "weight_scale"))
        return grouped.mxfp4_as_stored(codes, scale)


class GroupedBf16(GroupedExperts):
    """Weights decoded to bf16 once, for what the others cannot hold."""

    name = "triton_grouped_bf16"
    kernels = ("combine_kernel", "dense_kernel", "grouped_kernel", "route_kernel", "swiglu_kernel")

    def supports(self, request: ExpertRequest) -> str | None:
        """GPUs from SM80, for formats and activations whose products are (nearly always) exact in bf16."""
        weight = request.scheme.weight
        if request.device != "cuda" or (request.capability or 0) < 80:
            return "is for GPUs from SM80"
        if not (weight.exact_in_bf16 or weight.often_exact_in_bf16):
            return f"{weight.name} weights are not exact in bf16"
        if request.scheme.activation is None and request.dtype != torch.bfloat16:
            return f"unrounded activations in {request.dtype} are not exact in bf16"
        return None

    def operand(self, request: ExpertRequest) -> torch.dtype:
        """Return bf16."""
        del request
        return torch.bfloat16

    def keep(self, shards: Sequence[ShardWeight]) -> GroupedWeight:
        """Decoded."""
        return grouped.whole(*prepare_dense(merge_decoded(shards), torch.bfloat16))
