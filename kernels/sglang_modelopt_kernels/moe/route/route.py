"""The sorting as one PyTorch operator. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from sglang_modelopt_kernels.early import early

from .kernel import route_kernel

CHUNK = 4096
"""Pairs that a program reads at a time."""


@dataclass(frozen=True)
class Routed:
    """Pairs sorted by expert, in blocks of ``block``. Shapes depend on the number of pairs alone.

    Attributes:
        pairs: int32 ``[blocks * block]``: indices of pairs, ascending within an expert; padding has the number of pairs. Unused
            blocks are undefined.
        owner: int32 ``[blocks]``: the expert of a block; the number of experts for pairs of invalid experts, -1 for an unused
            block.
        first: int32 ``[experts + 2]``: the first block of each expert, that of invalid experts, and the number of used blocks.
        block: pairs in a block.
        single: whether each pair has a block of its own and ``owner`` is the expert of each pair, invalid ones included: nothing
            was sorted, and ``pairs`` and ``first`` are undefined. For the streamed product alone.
    """

    pairs: torch.Tensor
    owner: torch.Tensor
    first: torch.Tensor
    block: int
    single: bool = False


def most_blocks(pairs: int, experts: int, block: int) -> int:
    """Return the blocks that ``pairs`` pairs fill at most, whichever experts, valid or not, they have."""
    return (pairs + min(experts + 1, pairs) * (block - 1)) // block


def unsorted(pair_experts: torch.Tensor, block: int) -> Routed:
    """Return pairs as they are, int32 ``[R]``, each in a block of its own: those of one token, of which no two share an expert."""
    return Routed(pair_experts, pair_experts, pair_experts, block, single=True)


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
            **early(device),
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
    """Sort pairs by expert, without reading them from the host.

    Args:
        pair_experts: int32 or int64 ``[R]``: the expert of each pair; a value outside ``0 .. experts - 1`` is an invalid expert.
        experts: number of experts.
        block: pairs in a block, a power of two.

    Raises:
        ValueError: a shape, type or size that the kernel does not read.
    """
    if pair_experts.dim() != 1 or pair_experts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"experts must be int32 or int64 [R], got {tuple(pair_experts.shape)} {pair_experts.dtype}")
    if experts < 1 or block < 1 or block & (block - 1):
        raise ValueError(f"needs an expert and blocks of a power of two, got {experts} and {block}")
    ordered, owner, first = _route_pairs(pair_experts, experts, block)
    return Routed(ordered, owner, first, block)
