"""Naive twin of FP8 rounding: the activation formats' own rounding."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.formats.fp8 import FP8DynamicPerToken, FP8StaticPerTensor


def naive_quantize_fp8(
    x: torch.Tensor,
    smoothing: torch.Tensor | None,
    static_scale: torch.Tensor | None,
    token_amax: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Round as :func:`quantize_fp8` does; the values are in fp32."""
    x_fp32 = x.to(torch.float32)
    if smoothing is not None:
        x_fp32 = x_fp32 * smoothing.to(torch.float32)
    if static_scale is not None:
        return FP8StaticPerTensor().quantize(x_fp32, static_scale)
    return FP8DynamicPerToken().quantize(x_fp32, token_amax)
