"""Naive twin of the permutation: PyTorch's transposition."""

from __future__ import annotations

import torch


def naive_order(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Permute as :func:`order` does."""
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    y.unflatten(1, (-1, 4, 4, 4)).copy_(x.unflatten(1, (-1, 4, 4, 4)).transpose(2, 3))
    return y
