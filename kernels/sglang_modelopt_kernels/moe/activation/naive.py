"""Naive twin of the activation: the formula in float64."""

from __future__ import annotations

import math

import torch

from .function import SWIGLU, Activation


def naive_activate(
    h: torch.Tensor,
    activation: Activation = SWIGLU,
    bias: torch.Tensor | None = None,
    experts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute :func:`activate` in float64, ``[R, I]``."""
    x = h.to(torch.float64)
    if bias is not None and experts is not None:
        valid = experts >= 0
        x[valid] += bias.to(torch.float64)[experts[valid].long()]
    gate, up = x.chunk(2, dim=-1) if activation.gated else (x, None)
    limit = activation.limit if activation.limit is not None else math.inf
    if not activation.limits_function:
        gate = gate.clamp(max=limit)
    if activation.function == "silu":
        y = gate / (1 + torch.exp(-activation.alpha * gate))
    elif activation.function == "relu2":
        y = gate.clamp(min=0) ** 2
    elif activation.function == "gelu":
        y = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    else:
        y = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    if up is None:
        return y
    if activation.limits_function:
        y = y.clamp(max=limit)
    return y * (up.clamp(-limit, limit) + activation.offset)
