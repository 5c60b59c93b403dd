"""Naive twin of the FP4 x FP4 product of Blackwell: both sides decoded, one float64 product."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.formats import e2m1, e4m3, ue8m0
from sglang_modelopt_kernels.formats.base import BlockActivation
from sglang_modelopt_kernels.formats.checks import scale_blocks
from sglang_modelopt_kernels.gemm.common.naive import naive_epilogue


def naive_fp4_linear(
    x: BlockActivation, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the product of :func:`fp4_linear` without its ``out_scale`` in float64, ``[M, N]``.

    ``codes`` and ``scale`` are as stored and so are the block scales of ``x``: ``[rows, K / group]``, not swizzled.
    """
    return naive_epilogue(_decode(x.codes, x.scale) @ _decode(codes, scale).T, x.row_scale, None, bias)


def _decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    values = e2m1.decode(e2m1.unpack_codes(codes)).to(torch.float64)
    if scale.dtype == torch.float8_e4m3fn:
        return scale_blocks(values, e4m3.decode(scale).to(torch.float64))
    return scale_blocks(values, torch.exp2(scale.to(torch.float64) - ue8m0.BIAS))
