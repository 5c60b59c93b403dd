"""Naive twin of the MXFP4 x FP8 product of Blackwell: the stored weight decoded, one float64 product."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.formats import e2m1, ue8m0
from sglang_modelopt_kernels.formats.checks import scale_blocks
from sglang_modelopt_kernels.gemm.common.naive import naive_epilogue


def naive_mxfp4_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the product of :func:`mxfp4_linear` without its ``out_scale`` in float64, ``[M, N]``.

    ``codes`` uint8 ``[N, K / 2]`` and ``scale`` uint8 ``[N, K / 32]`` are as stored: neither paired nor swizzled.
    """
    values = e2m1.decode(e2m1.unpack_codes(codes)).to(torch.float64)
    weight = scale_blocks(values, torch.exp2(scale.to(torch.float64) - ue8m0.BIAS))
    return naive_epilogue(x.to(torch.float64) @ weight.T, row_scale, None, bias)
