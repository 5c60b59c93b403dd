"""The naive twin: one product in float64."""

from __future__ import annotations

import torch


def naive_combine(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """See :func:`combine`; float64 ``[T, N]``."""
    tokens, top_k = weights.shape
    choices = y.to(torch.float64).reshape(tokens, top_k, -1)
    return (choices * weights.to(torch.float64).unsqueeze(-1)).sum(dim=1)
