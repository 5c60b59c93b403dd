"""Experts on a GPU: one product for all of them, over their weights as they are or decoded in registers."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence

import torch

from sglang_modelopt_ext.backends.base import (
    ShardWeight,
    exact_float,
    fp8_objection,
    is_fp8,
    merge_blocks,
    merge_decoded,
    output_scales,
    type_objection,
)
from sglang_modelopt_ext.backends.experts.base import ExpertBackend, ExpertRequest, Routing
from sglang_modelopt_ext.backends.linear.streamed import stream_objection, stream_operand, stream_shards
from sglang_modelopt_ext.backends.tokens import covering
from sglang_modelopt_kernels.formats.fp8 import FP8, FP8_BLOCKS
from sglang_modelopt_kernels.formats.int8 import INT8
from sglang_modelopt_kernels.formats.mxfp4 import MXFP4
from sglang_modelopt_kernels.formats.mxfp8 import MXFP8
from sglang_modelopt_kernels.formats.nvfp4 import NVFP4
from sglang_modelopt_kernels.gemm.reference import prepare_dense
from sglang_modelopt_kernels.gemm.w4_decode import pack
from sglang_modelopt_kernels.gemm.w4_stream import missing
from sglang_modelopt_kernels.moe import grouped
from sglang_modelopt_kernels.moe.grouped import GroupedWeight
from sglang_modelopt_kernels.moe.grouped.launch import TAKEN
from sglang_modelopt_kernels.moe.grouped.weights import KIND_OF, Kind
from sglang_modelopt_kernels.moe.route import Routed, route, unsorted

FLOATS = (torch.float16, torch.bfloat16)


ACTIVATIONS = (FP8, NVFP4, MXFP4, MXFP8, INT8)
"""The number types of activations whose products with decoded weights were tested."""


class GroupedExperts(ExpertBackend[GroupedWeight]):
    """A product of :mod:`sglang_modelopt_kernels.moe.grouped`."""

    reads_unsorted = False
    """Whether the pairs of one token need not be sorted."""

    def prepare(self, experts: Sequence[Sequence[ShardWeight]]) -> GroupedWeight:
        """Stack the weights of all experts; see :meth:`keep`."""
        return grouped.stack([self.keep(shards) for shards in experts])

    def check_tokens(self, weight: GroupedWeight, request: ExpertRequest, top_k: int) -> tuple[int, ...]:
        """Return numbers of tokens for every launch and block size of :func:`grouped_linear`."""
        operand = self.operand(request)
        return covering(lambda m: grouped.path_of(weight, m * top_k, operand))

    @abstractmethod
    def keep(self, shards: Sequence[ShardWeight]) -> GroupedWeight:
        """Return the prepared weight of one expert. Raises ValueError when the backend cannot hold it."""

    def arrange(self, weight: GroupedWeight, operand: torch.dtype, routing: Routing) -> None:
        """Sort the rows by expert, once for all products of a pass."""
        self._sorted(weight, operand, routing)

    def matmul(
        self,
        weight: GroupedWeight,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        routing: Routing,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Multiply with :func:`grouped_linear`."""
        # What an earlier call sorted was followed by another launch: by that call's product, or by the rounding after `arrange`.
        routed, known = self._sorted(weight, values.dtype, routing)
        y: torch.Tensor = grouped.grouped_linear(
            values, weight, routed, routing.rows, row_scale, out_dtype, known=known
        )
        return y

    def _sorted(self, weight: GroupedWeight, operand: torch.dtype, routing: Routing) -> tuple[Routed, bool]:
        """Return the sorted rows, and whether they had been sorted before."""
        block = grouped.tile(weight, operand, routing.rows)
        single = self.reads_unsorted and routing.rows == routing.top_k
        key = ("grouped", weight.experts, block, single)
        known = key in routing.derived
        if not known:
            routing.derived[key] = (
                unsorted(routing.experts, block) if single else route(routing.experts, weight.experts, block)
            )
        routed: Routed = routing.derived[key]
        return routed, known


class GroupedDecoded(GroupedExperts):
    """Every weight format at its stored width, 4-bit weights decoded in registers."""

    name = "triton_grouped"
    kernels = ("activation_kernel", "combine_kernel", "decode_kernel", "dense_kernel", "grouped_kernel", "route_kernel")

    def supports(self, request: ExpertRequest) -> str | None:
        """GPUs from SM80, with activations that a type which the product takes holds exactly."""
        weight, activation = request.scheme.weight, request.scheme.activation
        if not request.target.at_least(80):
            return "is for GPUs from SM80"
        if request.k % 16:
            return f"needs K in 16s, not {request.k}"
        if activation is None and request.dtype not in FLOATS:
            return f"does not take unrounded activations in {request.dtype}"
        if activation is not None and activation.number_type not in ACTIVATIONS:
            return f"does not take {activation} activations"
        kind = _kind(request)
        if kind is None:
            return f"does not read {weight} weights"
        operand = self.operand(request)
        if operand not in TAKEN[kind]:
            return f"does not multiply {weight} weights by activations in {operand}"
        return None

    def operand(self, request: ExpertRequest) -> torch.dtype:
        """Return the type of the activations' values: E4M3 where the GPU has it, float16 for NVFP4 and INT8, bf16 for MX formats.

        A float32 model gets float16 for E4M3 values: FP8 matrix instructions may sum at less than its precision.
        """
        activation = request.scheme.activation
        if activation is None:
            return request.dtype
        if is_fp8(activation) and request.target.at_least(89) and request.dtype in FLOATS:
            return torch.float8_e4m3fn
        return exact_float(activation)

    def keep(self, shards: Sequence[ShardWeight]) -> GroupedWeight:
        """Keep the stored tensors; 4-bit codes are packed, and MXFP8 scales become relative to a row's largest."""
        number, math = shards[0].format.number_type, shards[0].math
        if number.bits == 4 and math == "exact":
            return grouped.packed(pack(merge_blocks(shards)))
        if number == MXFP8:
            codes, scale = (torch.cat([shard.tensors[name] for shard in shards]) for name in ("weight", "weight_scale"))
            return _scaled(grouped.mxfp8(codes, scale), shards)
        if number == FP8_BLOCKS:
            codes = torch.cat([shard.tensors["weight"] for shard in shards])
            scale = torch.cat([_rows_of_blocks(shard) for shard in shards])
            return _scaled(grouped.float_blocks(codes, scale), shards)
        dtype = torch.int8 if number == INT8 else torch.float8_e4m3fn
        return grouped.whole(*prepare_dense(merge_decoded(shards), dtype))


def _kind(request: ExpertRequest) -> Kind | None:
    """Return the kind of weight that :class:`GroupedDecoded` keeps for ``request``, or None where it keeps none."""
    return "e4m3" if request.math == "fp8" else KIND_OF.get(request.scheme.weight.number_type)


def _scaled(weight: GroupedWeight, shards: Sequence[ShardWeight]) -> GroupedWeight:
    """Return the weight of one expert with the stored scales of its outputs in ``out_scale``."""
    return dataclasses.replace(weight, out_scale=weight.out_scale * output_scales(shards))


def _rows_of_blocks(shard: ShardWeight) -> torch.Tensor:
    """Return the scales of 128 x 128 blocks for each row, float32 ``[N, ceil(K / 128)]``."""
    scale = shard.tensors["weight_scale"].to(torch.float32)
    rows = scale.reshape(scale.shape[0], -1).repeat_interleave(128, dim=0)
    return rows[: shard.tensors["weight"].shape[0]].contiguous()


class GroupedStreamed(GroupedExperts):
    """4-bit weights whose copies begin before their input is there: :mod:`sglang_modelopt_kernels.moe.streamed`."""

    name = "gluon_streamed_experts"
    kernels = (
        "activation_kernel",
        "combine_kernel",
        "dense_kernel",
        "route_kernel",
        "streamed_experts_kernel",
        "unstream_kernel",
    )
    interpreted = False
    reads_unsorted = True

    def supports(self, request: ExpertRequest) -> str | None:
        """MXFP4 and NVFP4 weights of whole tiles with FP8 activations, on SM90 with Triton's Gluon."""
        if not request.target.is_one_of(90):
            return "is for SM90"
        return missing() or stream_objection(request)

    def operand(self, request: ExpertRequest) -> torch.dtype:
        """Return E4M3 beside MXFP4, float16 beside NVFP4."""
        return stream_operand(request)

    def keep(self, shards: Sequence[ShardWeight]) -> GroupedWeight:
        """Put the shards into tiles, one below the other."""
        return grouped.tiled(stream_shards(shards))


class GroupedMxfp4(GroupedExperts):
    """MXFP4 weights as stored, in Blackwell's block-scaled matrix instructions."""

    name = "triton_grouped_mxfp4_tcgen05"
    kernels = ("activation_kernel", "combine_kernel", "grouped_kernel", "route_kernel")

    def supports(self, request: ExpertRequest) -> str | None:
        """MXFP4 weights with FP8 activations on SM100 and SM103."""
        if not (request.target.at_least(100) and request.target.before(110)):
            return "is for SM100 and SM103"
        return type_objection(request.scheme, (MXFP4,)) or fp8_objection(request)

    def operand(self, request: ExpertRequest) -> torch.dtype:
        """Return E4M3."""
        del request
        return torch.float8_e4m3fn

    def keep(self, shards: Sequence[ShardWeight]) -> GroupedWeight:
        """Keep the codes and block scales as they are stored."""
        codes, scale = (torch.cat([shard.tensors[name] for shard in shards]) for name in ("weight", "weight_scale"))
        return _scaled(grouped.mxfp4_as_stored(codes, scale), shards)


class GroupedBf16(GroupedExperts):
    """Weights decoded to bf16 once, for values that no other backend of experts on a GPU can hold."""

    name = "triton_grouped_bf16"
    kernels = ("activation_kernel", "combine_kernel", "dense_kernel", "grouped_kernel", "route_kernel")

    def supports(self, request: ExpertRequest) -> str | None:
        """GPUs from SM80, for formats and activations whose products are (nearly always) exact in bf16."""
        weight = request.scheme.weight
        if not request.target.at_least(80):
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
