"""Weights that are stored as they are: those of an expert that a recipe leaves out, beside quantized ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .base import DecodedWeight, Dim, NumberType, TensorSpec, ValueRule, WeightFormat
from .checks import check_weight


class UnquantizedWeight(WeightFormat):
    """``weight`` ``[N, K]`` in bf16, float16 or float32. Not registered: no algorithm of ModelOpt has it."""

    name = "unquantized"
    number_type = NumberType("float")
    exact_in_bf16 = False
    often_exact_in_bf16 = True

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """``weight``; float32 holds the values of all three types."""
        types = (torch.float32, torch.bfloat16, torch.float16)
        return (TensorSpec("weight", types, (Dim("N"), Dim("K")), ValueRule.FINITE),)

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> DecodedWeight:
        """Read one shard: unit = the weight, out scale = 1."""
        weight = tensors["weight"].to(torch.float32)
        return DecodedWeight(weight, weight.new_ones(()))

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``weight`` as it is. Raises ValueError unless it is a finite matrix ``[N, K]``."""
        check_weight(weight)
        return {"weight": weight}
