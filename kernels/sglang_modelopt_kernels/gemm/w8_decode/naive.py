"""The naive twin: the packed weight read back, one float64 product."""

from __future__ import annotations

import torch

from .packing import ByteWeight, unpack


def naive_eight_bit_linear(
    x: torch.Tensor,
    weight: ByteWeight,
    row_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the product of :func:`eight_bit_linear` in float64, ``[M, N]``."""
    y = x.to(torch.float64) @ unpack(weight).T * weight.out_scale.to(torch.float64)
    if row_scale is not None:
        y = y * row_scale.to(torch.float64)
    return y if bias is None else y + bias.to(torch.float64)
