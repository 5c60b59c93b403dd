"""Naive twin of the product of all experts: each pair alone, in float64."""

from __future__ import annotations

import torch

from .weights import GroupedWeight, unpack


def naive_grouped_linear(
    x: torch.Tensor,
    weight: GroupedWeight,
    pair_experts: torch.Tensor,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute :func:`grouped_linear` in float64, ``[R, N]``, from the expert of each pair, ``[R]``."""
    pairs = pair_experts.shape[0]
    share = pairs // x.shape[0]
    y = torch.zeros(pairs, weight.n, dtype=torch.float64, device=x.device)
    x_fp64 = x.to(torch.float32).to(torch.float64)
    units = {expert: unpack(weight, expert) for expert in set(pair_experts.tolist()) if 0 <= expert < weight.experts}
    for pair, expert in enumerate(pair_experts.tolist()):
        if expert in units:
            y[pair] = units[expert] @ x_fp64[pair // share] * weight.out_scale[expert].to(torch.float64)
            if row_scale is not None:
                y[pair] *= float(row_scale[pair])
    return y
