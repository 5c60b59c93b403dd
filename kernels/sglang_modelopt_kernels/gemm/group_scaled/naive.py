"""Naive twin of the group-scaled product: every value times the scale of its group, then one float64 product."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.formats.checks import scale_blocks
from sglang_modelopt_kernels.gemm.common import Epilogue
from sglang_modelopt_kernels.gemm.common.naive import naive_epilogue


def naive_multiply(x: torch.Tensor, unit: torch.Tensor, scale: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """Compute the product of :func:`multiply` for a whole weight, float64 ``[M, N]``.

    Args:
        x: ``[M, K]`` of a float type.
        unit: integers of a float type, ``[N, K]``.
        scale: float32 ``[N, K / group]``.
        epilogue: scales and bias of all N rows.
    """
    weight = scale_blocks(unit.to(torch.float64), scale.to(torch.float64))
    product = x.to(torch.float64) @ weight.T * epilogue.descale
    return naive_epilogue(product, epilogue.row_scale, epilogue.out_scale, epilogue.bias)
