"""MXFP8: E4M3 elements in blocks of 32 under UE8M0 scales, ``W = element * 2^(weight_scale - 127)`` (OCP MX v1.0, 5.2).

Source of the rounding: ModelOpt 0.47, ``MXFP8QTensor`` (``torch/quantization/qtensor/mxfp8_tensor.py``) for weights and
``torch/kernels/quantization/gemm/tensor_quant_mx.cu`` for activations.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import e4m3, ue8m0
from .base import ActivationFormat, BlockActivation, DecodedWeight, Dim, NumberType, TensorSpec, ValueRule, WeightFormat
from .checks import block_amax, check_activation, check_weight, no_scale, scale_blocks, split_blocks

BLOCK = 32
MXFP8 = NumberType("e4m3", (1, BLOCK), "ue8m0")
"""The number type of weights and activations."""


class MXFP8Weight(WeightFormat):
    """An MXFP8 weight: ``weight`` e4m3 ``[N, K]`` and ``weight_scale`` uint8 ``[N, K / 32]``.

    The unit weight is the whole weight, exact in float32. Below a scale of 2^-124 its smallest elements are below
    2^-133 and lost to bf16, which is why the format does not promise exactness there.
    """

    name = "mxfp8"
    number_type = MXFP8
    exact_in_bf16 = False
    often_exact_in_bf16 = True

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """``weight`` and ``weight_scale``."""
        block = Dim("K", BLOCK)
        return (
            TensorSpec("weight", (torch.float8_e4m3fn,), (Dim("N"), Dim("K")), ValueRule.FINITE),
            TensorSpec("weight_scale", (torch.uint8,), (Dim("N"), block), ValueRule.BLOCK_SCALE_UE8M0),
        )

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> DecodedWeight:
        """Read one shard: unit = element * block scale, infinite beyond the range of float32; out scale = 1."""
        unit = scale_blocks(e4m3.decode(tensors["weight"]), ue8m0.decode(tensors["weight_scale"]))
        return DecodedWeight(unit, unit.new_ones(()))

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of an export of ``weight`` ``[N, K]``, bit for bit.

        Raises:
            ValueError: the weight is not a finite matrix with K a multiple of 32.
        """
        check_weight(weight, BLOCK)
        scale = ue8m0.weight_scale(block_amax(weight, BLOCK), e4m3.MAX)
        return {"weight": _to_elements(weight, scale), "weight_scale": scale}


class MXFP8Dynamic(ActivationFormat):
    """Blocks of 32 inputs in E4M3 with dynamic UE8M0 scales ``2^ceil(log2(amax / 448))``.

    A block that holds NaN or infinity becomes NaN.
    """

    name = "mxfp8_dynamic"
    number_type = MXFP8

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return elements and block scales of float32 ``x`` ``[M, K]``.

        Returns:
            ``(elements, scale)``: e4m3 ``[M, K]`` and uint8 ``[M, K / 32]``, 255 for a block with NaN or infinity.

        Raises:
            ValueError: ``x`` is not float32 ``[M, K]`` with K a multiple of 32.
        """
        check_activation(x, BLOCK)
        scale = ue8m0.activation_scale(block_amax(x, BLOCK), e4m3.MAX)
        return _to_elements(x, scale), scale

    def quantize(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return values element * block scale, float32 ``[M, K]``; no row scale. Raises as :meth:`encode`, or for a scale."""
        no_scale(scale)
        elements, block_scale = self.encode(x)
        return scale_blocks(e4m3.decode(elements), ue8m0.decode(block_scale)), None

    def blocks(self, x: torch.Tensor, scale: torch.Tensor | None) -> BlockActivation:
        """Return elements and UE8M0 block scales. Raises as :meth:`encode`, or for a scale."""
        no_scale(scale)
        elements, block_scale = self.encode(x)
        return BlockActivation(elements, block_scale, None)


def _to_elements(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return ``x`` ``[..., K]`` divided by its block scales (bytes ``[..., K / 32]``) and rounded to E4M3."""
    return e4m3.to_e4m3(split_blocks(x, BLOCK) / ue8m0.decode(scale).unsqueeze(-1)).flatten(-2)
