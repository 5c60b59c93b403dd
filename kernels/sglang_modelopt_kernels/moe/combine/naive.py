"""Naive twin of the weighted sum, in float64."""

from __future__ import annotations

import torch


def naive_combine(y: torch.Tensor, top_k: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Compute :func:`combine` in float64, ``[T, N]``."""
    choices = y.to(torch.float64).unflatten(0, (-1, top_k))
    if weights is not None:
        choices = choices * weights.to(torch.float64).unsqueeze(-1)
    return choices.sum(dim=1)
