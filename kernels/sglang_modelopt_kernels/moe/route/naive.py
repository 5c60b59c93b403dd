"""The naive twin: a list for each expert."""

from __future__ import annotations

import torch


def naive_route(pair_experts: torch.Tensor, experts: int, block: int) -> list[tuple[int, list[int]]]:
    """The blocks that hold pairs, in order: an expert (``experts`` for nobody) and its pairs. See :func:`route`."""
    chosen = [int(expert) if 0 <= int(expert) < experts else experts for expert in pair_experts]
    blocks = []
    for expert in range(experts + 1):
        own = [pair for pair, owner in enumerate(chosen) if owner == expert]
        blocks += [(expert, own[start : start + block]) for start in range(0, len(own), block)]
    return blocks
