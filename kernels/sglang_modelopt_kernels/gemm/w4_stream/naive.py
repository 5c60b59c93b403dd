"""Naive twin of the streamed product: the packed weight decoded, one float64 product."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.gemm.common.naive import naive_epilogue

from .packing import StreamedWeight, unstream


def naive_streamed_linear(
    x: torch.Tensor,
    weight: StreamedWeight,
    row_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the product of :func:`streamed_linear` in float64, ``[M, N]``."""
    return naive_epilogue(x.to(torch.float64) @ unstream(weight).T, row_scale, weight.out_scale, bias)
