"""Naive twin of INT8 rounding: the activation format's own rounding."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.formats.int8 import INT8StaticPerTensor


def naive_quantize_int8(
    x: torch.Tensor, smoothing: torch.Tensor | None, static_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round as :func:`quantize_int8` does."""
    x_fp32 = x.to(torch.float32)
    if smoothing is not None:
        x_fp32 = x_fp32 * smoothing.to(torch.float32)
    values, scale = INT8StaticPerTensor().quantize(x_fp32, static_scale.reshape(()))
    if scale is None:
        raise ValueError("the format has a scale")
    spoiled = values.isnan()
    row_scale = torch.where(spoiled.any(dim=1, keepdim=True), torch.nan, scale)
    return torch.where(spoiled, 0.0, values).to(torch.int8), row_scale
