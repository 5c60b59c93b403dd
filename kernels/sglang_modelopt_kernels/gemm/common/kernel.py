"""Device functions of every tiled product, and the kernel that sums the parts of a product that others computed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tokens_first():
    """Return the row tile and the token tile of a program, token tiles fastest: consecutive programs share the weight in L2."""
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    return program // tl.num_programs(1), program % tl.num_programs(1)


@triton.jit
def steps_of(k, split, BK: tl.constexpr, SPLIT_K: tl.constexpr):
    """Return the first step along K of a split, and the number of its steps, which may be 0."""
    every = tl.cdiv(k, BK)
    each = tl.cdiv(every, SPLIT_K)
    first = split * each
    return first, tl.maximum(tl.minimum(each, every - first), 0)


@triton.jit
def rotated(step, first, steps):
    """Return the step after ``step`` others of a loop over ``steps`` that begins at ``first`` and wraps around.

    Programs that begin apart read different parts of the activations at a time; one part at a time for all is one slice of L2.
    """
    at = step + first
    return tl.where(at >= steps, at - steps, at)


@triton.jit
def drain_wgmma(offset, WGMMA: tl.constexpr):
    """Wait until no ``wgmma`` is in flight; call it first in each iteration of a loop that computes a left operand in registers.

    See :mod:`.wgmma` for the race without it. The wait stands here and not after the product, so that the product overlaps with
    the copies after it. ``offset`` is any scalar of the loop; without WGMMA nothing is emitted.
    """
    if WGMMA:
        tl.inline_asm_elementwise(
            "wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1;",
            "=r,r",
            args=[offset],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def store_tile(
    acc,
    y_ptr,
    partial_ptr,
    arrivals_ptr,
    rows,
    tokens,
    tile,
    split,
    m,
    n,
    row_scale_ptr,
    out_scale_ptr,
    bias_ptr,
    row_step,
    DESCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Write a tile ``[rows, tokens]`` of ``Y^T`` after its epilogue to ``y[m, n]``.

    With SPLIT_K > 1 the tile is a part of the sum. It goes to ``partial[split, m, n]``, and the last of a tile's programs to arrive
    adds all parts, in the order of the splits whichever it is. ``arrivals`` is zero before and after, an entry for each ``tile``.
    """
    row = tl.minimum(rows, n - 1).to(tl.int64)
    token = tl.minimum(tokens, m - 1).to(tl.int64)
    inside = (rows < n)[:, None] & (tokens < m)[None, :]
    # Unclamped rows, which the compiler knows to be consecutive: clamped ones take a register pair for every entry of the tile.
    at = token[None, :] * n + rows.to(tl.int64)[:, None]
    if SPLIT_K == 1:
        _store_scaled(
            acc, y_ptr + at, inside, row, token, row_scale_ptr, out_scale_ptr, bias_ptr, row_step,
            DESCALE, HAS_ROW_SCALE, HAS_BIAS,
        )  # fmt: skip
    else:
        part = tl.cast(m, tl.int64) * n
        tl.store(partial_ptr + split * part + at, acc, mask=inside)
        # All threads have stored before one of them announces it to the GPU.
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1:
            tl.store(arrivals_ptr + tile, 0)
            total = tl.load(partial_ptr + at, mask=inside, other=0, cache_modifier=".cg")
            for other in tl.static_range(1, SPLIT_K):
                total += tl.load(partial_ptr + other * part + at, mask=inside, other=0, cache_modifier=".cg")
            _store_scaled(
                total, y_ptr + at, inside, row, token, row_scale_ptr, out_scale_ptr, bias_ptr, row_step,
                DESCALE, HAS_ROW_SCALE, HAS_BIAS,
            )  # fmt: skip


@triton.jit
def _store_scaled(
    total,
    y_at,
    inside,
    row,
    token,
    row_scale_ptr,
    out_scale_ptr,
    bias_ptr,
    row_step,
    DESCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Apply scales and bias to a tile ``[rows, tokens]`` of ``Y^T`` and write it."""
    y = total * (tl.load(out_scale_ptr + row) * DESCALE)[:, None]
    if HAS_ROW_SCALE:
        y = y * tl.load(row_scale_ptr + token * row_step)[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + row).to(tl.float32)[:, None]
    tl.store(y_at, y.to(y_at.dtype.element_ty), mask=inside)


@triton.jit
def finish_kernel(
    partial_ptr,
    row_scale_ptr,
    out_scale_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    y_stride,
    row_step,
    DESCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BN: tl.constexpr,
):
    """Sum the partials ``[SPLITS, M, N]`` of one token in a fixed order, apply scales and bias, and write ``y[m, :N]``."""
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = rows < n
    at = partial_ptr + token * n + rows
    acc = tl.load(at, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(at + tl.full((), split, tl.int64) * m * n, mask=inside, other=0.0)
    y = acc * (tl.load(out_scale_ptr + rows, mask=inside, other=0.0) * DESCALE)
    if HAS_ROW_SCALE:
        y = y * tl.load(row_scale_ptr + token * row_step)
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * y_stride + rows, y.to(y_ptr.dtype.element_ty), mask=inside)
