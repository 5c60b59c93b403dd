"""INT8 weights under one float32 scale for each output channel, and INT8 activations under a static scale.

Sources: ``to_quantized_weight`` (``torch/export/quant_utils.py``) and ``_tensor_quant``
(``torch/quantization/tensor_quant.py``) of ModelOpt 0.47.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .base import ActivationFormat, DecodedWeight, Dim, NumberType, TensorSpec, ValueRule, WeightFormat
from .checks import check_activation, check_weight, divide, positive_amax, static_scale

MAX = 127.0
"""The value that amax is scaled to; -128 is a legal code that only a clipped value takes."""
INT8 = NumberType("int8")
"""The number type of weights and activations."""


def round_to_int8(x: torch.Tensor) -> torch.Tensor:
    """Round ``x`` to integers, ties to even, and saturate at -128 and 127; the dtype stays. NaN stays NaN."""
    return x.round().clamp(-MAX - 1, MAX)


class INT8PerChannelWeight(WeightFormat):
    """``weight`` int8 ``[N, K]`` and ``weight_scale`` float32 ``[N]``, as W8A8_SQ_PER_CHANNEL and W8A16 export."""

    name = "int8_per_channel"
    number_type = INT8
    output_scale = "weight_scale"
    exact_in_bf16 = True

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """``weight`` and ``weight_scale``."""
        return (
            TensorSpec("weight", (torch.int8,), (Dim("N"), Dim("K")), ValueRule.CODES),
            TensorSpec("weight_scale", (torch.float32,), (Dim("N"),), ValueRule.POSITIVE),
        )

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> DecodedWeight:
        """Read one shard: unit = codes, out scale = the scales ``[N, 1]``."""
        return DecodedWeight(
            tensors["weight"].to(torch.float32), tensors["weight_scale"].to(torch.float32).unsqueeze(1)
        )

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of an export of ``weight`` ``[N, K]``, bit for bit; an all-zero channel has scale 1.

        Raises:
            ValueError: the weight is not a finite matrix.
        """
        check_weight(weight)
        scale = divide(positive_amax(weight.abs().amax(dim=1), MAX), MAX)
        return {"weight": round_to_int8(weight / scale.unsqueeze(1)).to(torch.int8), "weight_scale": scale}


class INT8StaticPerTensor(ActivationFormat):
    """INT8 under the static ``input_scale`` = amax / 127: ``round(x * (1 / input_scale))``, ties to even.

    A value beyond the range saturates, infinity included; NaN stays NaN, which an int8 buffer could not hold.
    """

    name = "int8_static"
    number_type = INT8
    row_scale = "static"
    calibrated_range = MAX

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """``input_scale``."""
        return (TensorSpec("input_scale", (torch.float32,), (), ValueRule.POSITIVE),)

    def quantize(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return integers in float32 ``[M, K]`` and the scale, ``[]`` or ``[M, 1]``. Raises ValueError without a scale."""
        check_activation(x)
        input_scale = static_scale(scale, x.shape[0])
        return round_to_int8(x * (1 / input_scale)), input_scale
