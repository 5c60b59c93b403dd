"""The sorting as one PyTorch operator. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from .kernel import route_kernel

CHUNK = 4096
"""Pairs that a program looks at together."""


@dataclass(frozen=True)
class Routed:
    """Pairs sorted by expert, in blocks of ``block``; sizes depend on the number of pairs alone.

    Attributes:
        pairs: int32 ``[blocks * block]``: numbers of pairs, ascending within an expert, and the number of all pairs where there is
            none. Undefined in blocks without an owner.
        owner: int32 ``[blocks]``: the expert of a block, the number of experts for pairs that none of them serves, -1 for a
            block that is not used.
        first: int32 ``[experts + 2]``: the first block of each expert, that of nobody, and the number of blocks that are used.
        block: pairs to a block.
    """

    pairs: torch.Tensor
    owner: torch.Tensor
    first: torch.Tensor
    block: int


def most_blocks(pairs: int, experts: int, block: int) -> int:
    """The blocks that ``pairs`` pairs fill at most, however they are spread over the experts and nobody."""
    return (pairs + min(experts + 1, pairs) * (block - 1)) // block


@torch.library.custom_op("modelopt_ext::route_pairs", mutates_args=())
def _route_pairs(
    pair_experts: torch.Tensor, experts: int, block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pairs, device = pair_experts.shape[0], pair_experts.device
    blocks = most_blocks(pairs, experts, block)
    ordered = torch.empty(blocks * block, dtype=torch.int32, device=device)
    owner = torch.empty(blocks, dtype=torch.int32, device=device)
    first = torch.empty(experts + 2, dtype=torch.int32, device=device)
    if pairs:
        chunk = min(max(triton.next_power_of_2(pairs), 128), CHUNK)
        route_kernel[(experts + 1,)](
            pair_experts.contiguous(),
            ordered,
            owner,
            first,
            pairs,
            experts,
            blocks,
            BLOCK=block,
            CHUNK=chunk,
            BINS=triton.next_power_of_2(experts + 1),
            num_warps=4 if chunk <= 1024 else 8,
        )
    return ordered, owner, first


@_route_pairs.register_fake
def _(pair_experts: torch.Tensor, experts: int, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    blocks = most_blocks(pair_experts.shape[0], experts, block)
    ordered, owner, first = (
        pair_experts.new_empty(size, dtype=torch.int32) for size in (blocks * block, blocks, experts + 2)
    )
    return ordered, owner, first


def route(pair_experts: torch.Tensor, experts: int, block: int) -> Routed:
    """Sorts pairs by expert, without looking at them from the host.

    Args:
        pair_experts: int32 or int64 ``[R]``: the expert of each pair; what is not in ``0 .. experts - 1`` is nobody's.
        experts: how many there are.
        block: pairs to a block, a power of two.

    Raises:
        ValueError: a shape, type or size that the kernel does not read.
    """
    if pair_experts.dim() != 1 or pair_experts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"experts must be int32 or int64 [R], got {tuple(pair_experts.shape)} {pair_experts.dtype}")
    if experts < 1 or block < 1 or block & (block - 1):
        raise ValueError(f"needs an expert and blocks of a power of two, got {experts} and {block}")
    ordered, owner, first = _route_pairs(pair_experts, experts, block)
    return Routed(ordered, owner, first, block)
