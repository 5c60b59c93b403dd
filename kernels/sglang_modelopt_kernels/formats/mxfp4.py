"""MXFP4: E2M1 codes in blocks of 32 under UE8M0 scales, ``W = code * 2^(weight_scale - 127)`` (OCP MX v1.0, 5.2).

Source of the rounding: ModelOpt 0.47, ``MXFP4QTensor`` (``torch/quantization/qtensor/mxfp4_tensor.py``) for weights and
``torch/kernels/quantization/gemm/tensor_quant_mx.cu`` for activations.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import e2m1, ue8m0
from .base import (
    ActivationFormat,
    BlockActivation,
    BlockWeight,
    DecodedWeight,
    Dim,
    NumberType,
    SearchedWeightFormat,
    TensorSpec,
    ValueRule,
)
from .checks import block_amax, check_activation, no_scale, scale_blocks, split_blocks

BLOCK = 32
MXFP4 = NumberType("e2m1", (1, BLOCK), "ue8m0")
"""The number type of weights and activations."""


class MXFP4Weight(SearchedWeightFormat):
    """An MXFP4 weight: ``weight`` uint8 ``[N, K / 2]`` and ``weight_scale`` uint8 ``[N, K / 32]``.

    The unit weight is the whole weight. It is exact in bf16 over the full range of scales, where the smallest values,
    0.5 * 2^-127, are subnormal.
    """

    name = "mxfp4"
    number_type = MXFP4
    exact_in_bf16 = True

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """``weight`` and ``weight_scale``."""
        block = Dim("K", BLOCK)
        return (
            TensorSpec("weight", (torch.uint8,), (Dim("N"), Dim("K", 2)), ValueRule.CODES),
            TensorSpec("weight_scale", (torch.uint8,), (Dim("N"), block), ValueRule.BLOCK_SCALE_UE8M0),
        )

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> DecodedWeight:
        """Read one shard: unit = code * block scale, infinite beyond the range of float32; out scale = 1."""
        values = e2m1.decode(e2m1.unpack_codes(tensors["weight"]))
        unit = scale_blocks(values, ue8m0.decode(tensors["weight_scale"]))
        return DecodedWeight(unit, unit.new_ones(()))

    def blocks(self, tensors: Mapping[str, torch.Tensor]) -> BlockWeight:
        """Return the codes and scales of one shard; out scale = 1."""
        scale = tensors["weight_scale"]
        one = torch.ones((), dtype=torch.float32, device=scale.device)
        return BlockWeight(e2m1.unpack_codes(tensors["weight"]), scale, one, "e2m1", BLOCK)

    def scales(self, weight: torch.Tensor, amax: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return ``weight_scale`` of ``weight`` ``[N, K]``; there is no global scale, so that ``amax`` does not matter."""
        del amax
        return {"weight_scale": ue8m0.weight_scale(block_amax(weight, BLOCK), e2m1.MAX)}

    def encode(self, weight: torch.Tensor, scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return ``weight`` and ``weight_scale`` of a finite ``weight`` ``[N, K]``: ties round down and zero is code 8."""
        scale = scales["weight_scale"]
        scaled = split_blocks(weight, BLOCK) / ue8m0.decode(scale).unsqueeze(-1)
        codes = e2m1.encode(scaled, ties="down").flatten(-2)
        return {"weight": e2m1.pack_codes(codes), "weight_scale": scale}

    def candidates(self, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the scales halved.

        No other power of two has less error. Twice the scale has no value that the scale does not have, up to a maximum of 6. A
        quarter clips the largest element by at least 6 of its steps, whose square is more than all the other 31 can gain.
        """
        return (scale - (scale > 0).to(scale.dtype),)


class MXFP4Dynamic(ActivationFormat):
    """Blocks of 32 inputs in E2M1 with dynamic UE8M0 scales ``2^ceil(log2(amax / 6))``.

    Unlike ModelOpt's weights, its activations round ties to even. A block that holds NaN or infinity becomes NaN.
    """

    name = "mxfp4_dynamic"
    number_type = MXFP4

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and block scales of float32 ``x`` ``[M, K]``.

        Returns:
            ``(codes, scale)``: uint8 ``[M, K]``, one code to a byte, and uint8 ``[M, K / 32]``, 255 for a block that
            holds NaN or infinity.

        Raises:
            ValueError: ``x`` is not float32 ``[M, K]`` with K a multiple of 32.
        """
        check_activation(x, BLOCK)
        scale = ue8m0.activation_scale(block_amax(x, BLOCK), e2m1.MAX)
        codes = e2m1.encode(split_blocks(x, BLOCK) / ue8m0.decode(scale).unsqueeze(-1))
        return codes.flatten(-2), scale

    def quantize(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return values code * block scale, float32 ``[M, K]``; no row scale. Raises as :meth:`encode`, or for a scale."""
        no_scale(scale)
        codes, block_scale = self.encode(x)
        return scale_blocks(e2m1.decode(codes), ue8m0.decode(block_scale)), None

    def blocks(self, x: torch.Tensor, scale: torch.Tensor | None) -> BlockActivation:
        """Return packed codes and UE8M0 block scales. Raises as :meth:`encode`, or for a scale."""
        no_scale(scale)
        codes, block_scale = self.encode(x)
        return BlockActivation(e2m1.pack_codes(codes), block_scale, None)
