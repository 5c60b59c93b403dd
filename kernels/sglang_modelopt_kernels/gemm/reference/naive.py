"""Naive twin of a quantized linear layer, in float64 and in the order of the formula."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.formats.base import ActivationFormat, DecodedWeight


def naive_linear(
    x: torch.Tensor,
    weight: DecodedWeight,
    activation: ActivationFormat | None,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute ``Q(x) @ W^T + bias`` in float64.

    Args:
        x: ``[M, K]``, any float type.
        weight: the decoded weight ``[N, K]``.
        activation: the format that ``x`` is rounded to; None for no rounding.
        input_scale: float32 ``[]``, the static activation scale, if the format has one.
        bias: ``[N]`` or None.

    Returns:
        float64 ``[M, N]``.
    """
    rounded = x.to(torch.float64)
    if activation is not None:
        values, row_scale = activation.quantize(x.to(torch.float32), input_scale)
        rounded = values.to(torch.float64)
        if row_scale is not None:
            rounded = rounded * row_scale.to(torch.float64)
    y = rounded @ (weight.unit.to(torch.float64) * weight.out_scale.to(torch.float64)).T
    return y if bias is None else y + bias.to(torch.float64)
