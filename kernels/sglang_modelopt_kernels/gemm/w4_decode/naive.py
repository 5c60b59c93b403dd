"""Naive twin of the 4-bit product: the packed weight decoded, one float64 product."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.gemm.common.naive import naive_epilogue

from .packing import PackedWeight, unpack


def naive_block_scaled_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    row_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the product of :func:`block_scaled_linear` in float64, ``[M, N]``."""
    return naive_epilogue(x.to(torch.float64) @ unpack(weight).T, row_scale, weight.out_scale, bias)
