"""The product of all experts as one PyTorch operator."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.gemm.common import machine
from sglang_modelopt_kernels.moe.route import Routed, most_blocks
from sglang_modelopt_kernels.moe.streamed import launch as streamed

from .dense import dense_block, run_dense, takes_dense
from .launch import choose_block, math_of, run
from .weights import KINDS, TILES, GroupedWeight


def tile(weight: GroupedWeight, dtype: torch.dtype, pairs: int, dense: bool | None = None) -> int:
    """Return the block size for :func:`route`, for ``pairs`` pairs and activations of ``dtype``.

    ``dense`` selects the dense product, None by size, as in :func:`grouped_linear`.
    """
    capability = machine(weight.codes.device)[0]
    if takes_dense(weight, dtype, pairs, capability) if dense is None else dense:
        return dense_block(weight, dtype, pairs, capability)
    if weight.kind in TILES:
        return streamed.choose_block(pairs, weight.experts)
    return choose_block(weight.kind, dtype, pairs, weight.experts, capability)


def path_of(weight: GroupedWeight, pairs: int, dtype: torch.dtype) -> tuple[bool, int, bool]:
    """Return what :func:`grouped_linear` runs for ``pairs`` pairs: whether dense tiles, the pairs to a block, and if K is split."""
    capability, sms = machine(weight.codes.device)
    dense = takes_dense(weight, dtype, pairs, capability)
    block = tile(weight, dtype, pairs)
    streams = weight.kind in TILES and not dense
    return dense, block, streams and streamed.plan_of(weight, block, pairs, sms).split > 1


@torch.library.custom_op("modelopt_ext::grouped_linear", mutates_args=())
def _grouped_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    out_scale: torch.Tensor,
    kind: str,
    fp8: bool,
    sorted_pairs: torch.Tensor,
    owner: torch.Tensor,
    first: torch.Tensor,
    block: int,
    single: bool,
    pairs: int,
    row_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
    dense: bool,
    known: bool,
) -> torch.Tensor:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of weight: {kind!r}")
    weight = GroupedWeight(codes, scale, out_scale, kind, fp8)
    if pairs == 0:
        return torch.empty((0, weight.n), dtype=out_dtype, device=x.device)
    routed = Routed(sorted_pairs, owner, first, block, single)
    if weight.kind in TILES and not dense:
        return streamed.run(x, weight, routed, pairs, row_scale, out_dtype, known=known)
    if row_scale is not None and row_scale.shape[0] != pairs:
        row_scale = row_scale.repeat_interleave(pairs // row_scale.shape[0], dim=0)
    return (run_dense if dense else run)(x, weight, routed, pairs, row_scale, out_dtype)


@_grouped_linear.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    out_scale: torch.Tensor,
    kind: str,
    fp8: bool,
    sorted_pairs: torch.Tensor,
    owner: torch.Tensor,
    first: torch.Tensor,
    block: int,
    single: bool,
    pairs: int,
    row_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
    dense: bool,
    known: bool,
) -> torch.Tensor:
    del scale, out_scale, kind, fp8, sorted_pairs, owner, first, block, single, row_scale, dense, known
    return x.new_empty((pairs, codes.shape[1]), dtype=out_dtype)


def grouped_linear(
    x: torch.Tensor,
    weight: GroupedWeight,
    routed: Routed,
    pairs: int,
    row_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    dense: bool | None = None,
    known: bool = False,
) -> torch.Tensor:
    """Compute ``y[r] = (x[..] @ unit[e]^T) * row_scale[r] * out_scale[e]`` for the expert ``e`` of each pair ``r``.

    Products are exact and the sum is fp32 (FP8 matrix instructions keep about 13 bits of it on Hopper). Neither the host nor the
    sizes of allocations depend on the routing.

    Args:
        x: ``[R, K]``, or ``[R / top_k, K]`` where the choices of a token read the same row. FP8 E4M3, float16 or bf16:
            those of its kind in :data:`TAKEN`.
        weight: the weights of all experts.
        routed: the pairs, sorted in blocks of :func:`tile`.
        pairs: ``R``.
        row_scale: float32 ``[R, 1]``, or fewer rows, each for as many adjacent pairs; None for 1.
        out_dtype: type of the result.
        dense: whether weights are decoded once for a dense product; None for the choice by size, as in :func:`tile`.
        known: whether a kernel was launched on this stream after the one that wrote ``routed``: the product may then read that
            before the kernel ahead of it has ended. All kernels of this package let others begin only once those before them have.

    Returns:
        ``[R, N]`` of ``out_dtype``, rounded once; zero for pairs of an invalid expert.

    Raises:
        ValueError: a dtype or shape that the kernel does not read.
    """
    if x.dim() != 2 or x.shape[1] != weight.k:
        raise ValueError(f"x must be [R, {weight.k}], got {tuple(x.shape)}")
    if (pairs == 0) != (x.shape[0] == 0) or (pairs and pairs % x.shape[0]):
        raise ValueError(f"{pairs} pairs do not share {x.shape[0]} rows evenly")
    capability = machine(x.device)[0]
    math_of(weight.kind, x.dtype, capability)
    if dense is None:
        dense = takes_dense(weight, x.dtype, pairs, capability)
    blocks = pairs if routed.single else most_blocks(pairs, weight.experts, routed.block)
    if routed.owner.shape != (blocks,) or not (routed.single or routed.pairs.shape == (blocks * routed.block,)):
        raise ValueError(f"the pairs were sorted for another size: {routed.owner.shape[0]} blocks, not {blocks}")
    if routed.single and (dense or weight.kind not in TILES):
        raise ValueError(f"{'dense tiles' if dense else weight.kind} need pairs that are sorted")
    if row_scale is not None and pairs:
        count = row_scale.shape[0] if row_scale.dim() == 2 and row_scale.shape[1] == 1 else 0
        if row_scale.dtype != torch.float32 or not count or pairs % count:
            found = f"{tuple(row_scale.shape)} {row_scale.dtype}"
            raise ValueError(f"row_scale must be float32 [{pairs}, 1], or fewer rows that divide them, got {found}")
    y: torch.Tensor = _grouped_linear(
        x,
        weight.codes,
        weight.scale,
        weight.out_scale,
        weight.kind,
        weight.fp8,
        routed.pairs,
        routed.owner,
        routed.first,
        routed.block,
        routed.single,
        pairs,
        row_scale,
        out_dtype,
        dense,
        known,
    )
    return y
