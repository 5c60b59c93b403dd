"""Naive twin of the 8-bit product: the weight decoded, one float64 product."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.gemm.common.naive import naive_epilogue

from .packing import ByteWeight, unpack


def naive_eight_bit_linear(
    x: torch.Tensor,
    weight: ByteWeight,
    row_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the product of :func:`eight_bit_linear` in float64, ``[M, N]``."""
    return naive_epilogue(x.to(torch.float64) @ unpack(weight).T, row_scale, weight.out_scale, bias)
