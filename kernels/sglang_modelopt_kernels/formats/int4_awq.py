"""INT4 weights in blocks of 128 under float32 scales, packed along N: ``W = code * weight_scale``.

Source: ``pack_int4_in_uint8`` and ``get_weight_scaling_factor`` (``torch/export/quant_utils.py``) of ModelOpt 0.47. The
AWQ search itself only rescales the weight beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import e4m3
from .base import BlockWeight, DecodedWeight, Dim, NumberType, TensorSpec, ValueRule, WeightFormat
from .checks import block_amax, check_weight, divide, positive_amax, scale_blocks, split_blocks

BLOCK = 128
MAX = 7.0
"""The value that amax is scaled to; -8 is a legal code that only a clipped value takes."""
INT4 = NumberType("int4", (1, BLOCK), "float32")
"""The number type of the weights."""


def unpack_rows(packed: torch.Tensor) -> torch.Tensor:
    """Packed uint8 ``[N / 2, K]`` to int8 codes -8..7 ``[N, K]``: byte ``[o, i]`` is row 2o low, row 2o + 1 high."""
    nibbles = torch.stack((packed & 0x0F, packed >> 4), dim=1).flatten(0, 1).to(torch.int8)
    return (nibbles ^ 8) - 8  # sign extension of four bits


def pack_rows(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes -8..7, int8 ``[N, K]``, to uint8 ``[N / 2, K]``. Raises ValueError when N is odd."""
    if codes.shape[0] % 2:
        raise ValueError(f"N = {codes.shape[0]} is odd: two output channels share a byte")
    nibbles = codes.to(torch.uint8) & 0x0F
    return nibbles[0::2] | (nibbles[1::2] << 4)


class INT4Weight(WeightFormat):
    """``weight`` uint8 ``[N / 2, K]`` and ``weight_scale`` float32 ``[N, K / 128]``, as W4A16_AWQ exports."""

    name = "int4_awq"
    number_type = INT4
    exact_in_bf16 = False

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """``weight`` and ``weight_scale``."""
        return (
            TensorSpec("weight", (torch.uint8,), (Dim("N", 2), Dim("K")), ValueRule.CODES),
            TensorSpec("weight_scale", (torch.float32,), (Dim("N"), Dim("K", BLOCK)), ValueRule.POSITIVE),
        )

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> DecodedWeight:
        """Read one shard: unit = code * block scale, rounded to float32; out scale = 1."""
        codes = unpack_rows(tensors["weight"]).to(torch.float32)
        unit = scale_blocks(codes, tensors["weight_scale"].to(torch.float32))
        return DecodedWeight(unit, unit.new_ones(()))

    def blocks(self, tensors: Mapping[str, torch.Tensor]) -> BlockWeight:
        """Return the codes and scales of one shard; out scale = 1."""
        scale = tensors["weight_scale"].to(torch.float32)
        return BlockWeight(unpack_rows(tensors["weight"]), scale, scale.new_ones(()), "int4", BLOCK)

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a max-calibrated export of ``weight`` ``[N, K]``, bit for bit; a zero block has scale 1.

        Raises:
            ValueError: the weight is not a finite matrix with K a multiple of 128 and N even.
        """
        check_weight(weight, BLOCK)
        # ModelOpt's static block quantizer keeps amax in float32, where the others keep the dtype of the weight.
        scale = divide(positive_amax(block_amax(weight, BLOCK), MAX), MAX)
        codes = (split_blocks(weight, BLOCK) / scale.unsqueeze(-1)).round().clamp(-MAX - 1, MAX)
        return {"weight": pack_rows(codes.flatten(-2).to(torch.int8)), "weight_scale": scale}


class INT4WeightUnderFP8(INT4Weight):
    """:class:`INT4Weight` as W4A8_AWQ exports it, with the ``weight_scale_2`` of a further rounding to FP8.

    ``weight_scale_2`` = amax / 448 would bring the decoded weight into the range of E4M3. It is advice to a kernel,
    not a part of the weight: :meth:`decode` ignores it.
    """

    name = "int4_awq_w4a8"

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """``weight``, ``weight_scale`` and ``weight_scale_2``."""
        return (*super().tensors, TensorSpec("weight_scale_2", (torch.float32,), (), ValueRule.POSITIVE))

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of :meth:`INT4Weight.quantize` and ``weight_scale_2`` = amax / 448.

        ModelOpt gives q, k and v, and gate and up, the largest of theirs.
        """
        tensors = super().quantize(weight)
        return {**tensors, "weight_scale_2": divide(positive_amax(weight.abs().amax(), e4m3.MAX), e4m3.MAX)}
