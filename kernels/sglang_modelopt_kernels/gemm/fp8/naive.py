"""Naive twin of the FP8 product: one float64 product of the E4M3 values."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.gemm.common.naive import naive_epilogue


def naive_fp8_linear(
    values: torch.Tensor,
    row_scale: torch.Tensor | None,
    unit: torch.Tensor,
    out_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the product of :func:`fp8_linear` in float64, ``[M, N]``; ``unit`` is ``[N, K]``, ``out_scale`` ``[N]``."""
    return naive_epilogue(values.to(torch.float64) @ unit.to(torch.float64).T, row_scale, out_scale, bias)
