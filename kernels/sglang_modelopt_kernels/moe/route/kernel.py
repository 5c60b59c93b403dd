"""Counting sort of pairs by expert, one program for each expert."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.early import after_previous


@triton.jit
def _load_experts(experts_ptr, pair, pairs, experts):
    """Load the experts of some pairs; ``experts`` for an invalid expert and past the last pair."""
    expert = tl.load(experts_ptr + pair, mask=pair < pairs, other=-1)
    return tl.where((expert >= 0) & (expert < experts), expert, experts).to(tl.int32)


@triton.jit
def route_kernel(
    experts_ptr,
    sorted_ptr,
    owner_ptr,
    first_ptr,
    pairs,
    experts,
    blocks,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write the blocks of one expert. The last program writes the pairs of invalid experts and marks the unused blocks.

    Every program counts all pairs, so that none waits for another, and writes its pairs in ascending order.
    """
    own = tl.program_id(0)
    after_previous(PDL)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        counts += tl.histogram(_load_experts(experts_ptr, pair, pairs, experts), BINS)
    # The padding of the last chunk was counted as invalid.
    counts -= tl.where(bins == experts, tl.cdiv(pairs, CHUNK) * CHUNK - pairs, 0)
    needed = (counts + BLOCK - 1) // BLOCK
    first = tl.sum(tl.where(bins < own, needed, 0))
    last = first + tl.sum(tl.where(bins == own, needed, 0))
    tl.store(first_ptr + own, first)
    at = first * BLOCK
    for start in range(0, pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        mine = ((_load_experts(experts_ptr, pair, pairs, experts) == own) & (pair < pairs)).to(tl.int32)
        tl.store(sorted_ptr + at + tl.cumsum(mine) - 1, pair, mask=mine > 0)
        at += tl.sum(mine)
    padding = at + tl.arange(0, BLOCK)
    tl.store(sorted_ptr + padding, pairs, mask=padding < last * BLOCK)
    for start in range(first, last, BLOCK):
        block = start + tl.arange(0, BLOCK)
        tl.store(owner_ptr + block, own, mask=block < last)
    if own == experts:
        tl.store(first_ptr + experts + 1, last)
        for start in range(last, blocks, CHUNK):
            block = start + tl.arange(0, CHUNK)
            tl.store(owner_ptr + block, -1, mask=block < blocks)
