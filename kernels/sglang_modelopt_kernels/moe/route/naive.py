"""Naive twin of routing: a list for each expert."""

from __future__ import annotations

import torch


def naive_route(pair_experts: torch.Tensor, experts: int, block: int) -> list[tuple[int, list[int]]]:
    """Return the blocks that hold pairs in the order of :func:`route`: an expert (``experts`` for an invalid one) and its pairs."""
    chosen = [int(expert) if 0 <= int(expert) < experts else experts for expert in pair_experts]
    blocks = []
    for expert in range(experts + 1):
        own = [pair for pair, owner in enumerate(chosen) if owner == expert]
        blocks += [(expert, own[start : start + block]) for start in range(0, len(own), block)]
    return blocks
