"""Naive twin of SwiGLU with rounding: the formula in float64, and the activation formats' own rounding."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.quantize.fp8.naive import naive_quantize_fp8


def naive_swiglu_fp8(
    h: torch.Tensor, smoothing: torch.Tensor | None = None, static_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute :func:`swiglu_fp8`: ``gated`` of the type of ``h``, values in fp32 and their scale."""
    gate, up = h.to(torch.float64).chunk(2, dim=-1)
    gated = (gate / (1 + torch.exp(-gate)) * up).to(h.dtype)
    return gated, *naive_quantize_fp8(gated, smoothing, static_scale, None)
