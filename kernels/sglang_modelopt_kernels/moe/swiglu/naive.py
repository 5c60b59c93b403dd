"""Naive twin of SwiGLU: the formula in float64."""

from __future__ import annotations

import torch


def naive_swiglu(h: torch.Tensor) -> torch.Tensor:
    """Compute :func:`swiglu` in float64, ``[R, I]``."""
    gate, up = h.to(torch.float64).chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up
