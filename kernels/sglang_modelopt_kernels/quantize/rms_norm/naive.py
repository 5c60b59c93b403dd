"""Naive twin of RMSNorm with rounding: the formula in float64, and the activation formats' own rounding."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.quantize.fp8.naive import naive_quantize_fp8


def naive_rms_norm_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    smoothing: torch.Tensor | None = None,
    static_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute :func:`rms_norm_fp8` and change nothing: ``normed`` of the type of ``x``, values in fp32 and their scale."""
    total = x.to(torch.float64) if residual is None else x.to(torch.float64) + residual.to(torch.float64)
    mean_square = total.square().mean(dim=1, keepdim=True)
    normed = (total * (mean_square + eps).rsqrt() * weight.to(torch.float64)).to(x.dtype)
    return normed, *naive_quantize_fp8(normed, smoothing, static_scale, None)
