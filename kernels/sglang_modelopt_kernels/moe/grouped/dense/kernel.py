"""``Y = X W^T`` for sorted pairs, a tile for many pairs of one expert, both operands from shared memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum(
    x_ptr,
    w_ptr,
    s_ptr,
    x_row,
    w_row,
    column,
    rows,
    k,
    end,
    GROUP: tl.constexpr,
    FP8: tl.constexpr,
    ASM: tl.constexpr,
    EVEN_K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Multiply activations at offsets ``x_row`` by weights at offsets ``w_row`` over K ``0 .. end``: fp32 ``[BM, BN]``."""
    offs_k = tl.arange(0, BK)
    # Under block scales the weight is the left operand: a thread then holds few of its rows, and few scales.
    acc = tl.zeros((BN, BM) if GROUP else (BM, BN), tl.float32)
    for offset in range(0, end, BK):
        # Add the offset to the base pointers first, which are uniform.
        x_at = (x_ptr + offset) + (x_row[:, None] + offs_k[None, :])
        w_at = (w_ptr + offset) + (w_row[None, :] + offs_k[:, None])
        if EVEN_K:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(offset + offs_k < k)[None, :], other=0.0)
            w = tl.load(w_at, mask=(offset + offs_k < k)[:, None], other=0.0)
        if not ASM:
            # Triton's interpreter multiplies the raw bits of bf16 and E4M3 operands: give it the same values in fp32.
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        if GROUP:
            scale = tl.load(s_ptr + (offset // GROUP) * rows + column)
            acc += tl.dot(tl.trans(w), tl.trans(x), input_precision="ieee") * scale[:, None]
        elif FP8 and ASM:
            # On Hopper the instruction keeps about 14 bits of a sum: promote to fp32 after every step.
            acc = tl.dot(x, w, acc, max_num_imprecise_acc=BK)
        else:
            acc = tl.dot(x, w, acc, input_precision="ieee")
    if GROUP:
        acc = tl.trans(acc)
    return acc


@triton.jit(do_not_specialize=["pairs", "share", "experts", "first", "last"])
def dense_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    pairs_ptr,
    owner_ptr,
    first_ptr,
    row_scale_ptr,
    out_scale_ptr,
    y_ptr,
    pairs,
    share,
    experts,
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
    NARROW: tl.constexpr,
    EVEN_K: tl.constexpr,
    STRIPE: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute one tile ``[BM, BN]`` of ``y[pairs, n]``, columns ``0 .. rows``, of the blocks of experts ``first .. last``.

    Pair ``r`` reads row ``r // share`` of ``x``; NARROW: offsets there fit int32. ``w`` holds the experts in the dtype of ``x``,
    ``[last - first, rows, k]``; a ``last`` above ``experts`` adds the pairs of invalid experts. With GROUP > 0, ``s`` scales the
    sum over each GROUP of K, ``[last - first, k / GROUP, rows]``.

    The host does not know the number of blocks and launches a program for every tile there could be. Blocks are ordered in stripes
    of STRIPE, fastest within a stripe, so that programs that run together share operands in L2.
    """
    tile = tl.program_id(0)
    before = tl.load(first_ptr + first)
    own = tl.load(first_ptr + last) - before
    columns = tl.cdiv(rows, BN)
    if tile >= own * columns:
        return
    stripe = tile // (STRIPE * columns)
    within = tile % (STRIPE * columns)
    height = tl.minimum(own - stripe * STRIPE, STRIPE)
    block = before + stripe * STRIPE + within % height
    start = (within // height) * BN
    owner = tl.load(owner_ptr + block)
    expert = tl.minimum(owner, experts - 1)
    pair = tl.load(pairs_ptr + block.to(tl.int64) * BM + tl.arange(0, BM))
    # Rows and pairs out of range read the last one: no mask in the loop, and their results are not stored.
    token = tl.minimum(pair, pairs - 1) // share
    column = start + tl.arange(0, BN)
    held = (expert - first).to(tl.int64)
    acc = _sum(
        x_ptr,
        w_ptr + (held * rows + start) * k,
        s_ptr + held * tl.cdiv(k, GROUP if GROUP else BK) * rows,
        (token if NARROW else token.to(tl.int64)) * k,
        tl.minimum(tl.arange(0, BN), rows - 1 - start) * k,
        tl.minimum(column, rows - 1),
        rows,
        k,
        tl.where(owner == experts, 0, k),
        GROUP,
        FP8,
        ASM,
        EVEN_K,
        BN,
        BM,
        BK,
    )
    out_scale = tl.load(out_scale_ptr + expert.to(tl.int64) * n + column, mask=column < rows, other=0.0)
    y = acc * (out_scale * DESCALE)[None, :]
    if HAS_ROW_SCALE:
        y = y * tl.load(row_scale_ptr + tl.minimum(pair, pairs - 1))[:, None]
    y = tl.where(owner == experts, 0.0, y)
    y_at = y_ptr + pair.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=(pair < pairs)[:, None] & (column < rows)[None, :])
