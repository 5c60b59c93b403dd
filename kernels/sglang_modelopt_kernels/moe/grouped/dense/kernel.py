"""``Y = X W^T`` for sorted pairs, in tiles of many pairs of one expert, both operands through shared memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _count_blocks(owner_ptr, blocks, first, last):
    """How many blocks belong to experts before ``first``, and how many to experts ``first .. last``."""
    before = tl.zeros((), tl.int32)
    own = tl.zeros((), tl.int32)
    for start in range(0, blocks, 1024):
        block = start + tl.arange(0, 1024)
        owner = tl.load(owner_ptr + block, mask=block < blocks, other=-1)
        before += tl.sum(((owner >= 0) & (owner < first)).to(tl.int32))
        own += tl.sum(((owner >= first) & (owner < last)).to(tl.int32))
    return before, own


@triton.jit(do_not_specialize=["pairs", "experts", "blocks", "first", "last"])
def dense_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    pairs_ptr,
    owner_ptr,
    row_scale_ptr,
    out_scale_ptr,
    y_ptr,
    pairs,
    experts,
    blocks,
    first,
    last,
    rows,
    n,
    k,
    GROUP: tl.constexpr,
    FP8: tl.constexpr,
    ASM: tl.constexpr,
    DESCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    SHARE: tl.constexpr,
    NARROW: tl.constexpr,
    EVEN_K: tl.constexpr,
    STRIPE: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Tiles ``[BM, BN]`` of ``y``, ``[pairs, n]``, columns ``0 .. rows``, for the blocks of experts ``first .. last``.

    ``w`` holds those experts, ``[last - first, rows, k]``, of the type of ``x``; a ``last`` above ``experts`` adds the pairs of
    nobody. With GROUP > 0, ``s`` scales the sum over each GROUP inputs, ``[last - first, k / GROUP, rows]``. The host does not
    know how many blocks there are, so a program takes tile after tile. NARROW: offsets in ``x`` fit int32.

    Blocks go in stripes of STRIPE, within which they vary fastest: programs that run together share weights and activations.
    """
    before, own = _count_blocks(owner_ptr, blocks, first, last)
    columns = tl.cdiv(rows, BN)
    input_ = tl.arange(0, BK)
    for tile in range(tl.program_id(0), own * columns, tl.num_programs(0)):
        stripe = tile // (STRIPE * columns)
        within = tile % (STRIPE * columns)
        height = tl.minimum(own - stripe * STRIPE, STRIPE)
        block = before + stripe * STRIPE + within % height
        owner = tl.load(owner_ptr + block)
        expert = tl.minimum(owner, experts - 1)
        start = (within // height) * BN
        pair = tl.load(pairs_ptr + block.to(tl.int64) * BM + tl.arange(0, BM))
        # Out of range rows and pairs read the last one: no mask in the loop, and nothing of theirs is stored.
        token = tl.minimum(pair, pairs - 1) // SHARE
        x_row = (token if NARROW else token.to(tl.int64)) * k
        w_row = tl.minimum(tl.arange(0, BN), rows - 1 - start) * k
        w_first = w_ptr + ((expert - first).to(tl.int64) * rows + start) * k
        s_at = s_ptr + (expert - first).to(tl.int64) * tl.cdiv(k, GROUP if GROUP else BK) * rows
        column = start + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for offset in range(0, tl.where(owner == experts, 0, k), BK):
            x_at = (x_ptr + offset) + (x_row[:, None] + input_[None, :])
            w_at = (w_first + offset) + (w_row[None, :] + input_[:, None])
            if EVEN_K:
                x = tl.load(x_at)
                w = tl.load(w_at)
            else:
                x = tl.load(x_at, mask=(offset + input_ < k)[None, :], other=0.0)
                w = tl.load(w_at, mask=(offset + input_ < k)[:, None], other=0.0)
            if not ASM:
                # The interpreter multiplies the bits of bf16 and E4M3 operands: it gets the same numbers in float32.
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            if GROUP:
                scale = tl.load(s_at + (offset // GROUP) * rows + tl.minimum(column, rows - 1))
                acc += tl.dot(x, w, input_precision="ieee") * scale[None, :]
            elif FP8 and ASM:
                # On Hopper the instruction keeps about 14 bits of a sum: promoted to float32 after every step.
                acc = tl.dot(x, w, acc, max_num_imprecise_acc=BK)
            else:
                acc = tl.dot(x, w, acc, input_precision="ieee")
        out_scale = tl.load(out_scale_ptr + expert.to(tl.int64) * n + column, mask=column < rows, other=0.0)
        y = acc * (out_scale * DESCALE)[None, :]
        if HAS_ROW_SCALE:
            y = y * tl.load(row_scale_ptr + tl.minimum(pair, pairs - 1))[:, None]
        y = tl.where(owner == experts, 0.0, y)
        y_at = y_ptr + pair.to(tl.int64)[:, None] * n + column[None, :]
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=(pair < pairs)[:, None] & (column < rows)[None, :])
