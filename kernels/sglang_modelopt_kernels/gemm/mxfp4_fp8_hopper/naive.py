"""Naive twin of the MXFP4 x FP8 product of SM89 and SM90: the packed weight decoded, one float64 product."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.gemm.common.naive import naive_epilogue

from .packing import FoldedWeight, unfold


def naive_folded_linear(
    x: torch.Tensor,
    weight: FoldedWeight,
    row_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the product of :func:`folded_linear` in float64, ``[M, N]``."""
    return naive_epilogue(x.to(torch.float64) @ unfold(weight).T, row_scale, weight.out_scale, bias)
