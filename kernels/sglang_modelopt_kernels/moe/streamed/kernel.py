"""``Y^T = W X^T`` in Gluon for the pairs of one block: the tiles of several output features as one stream.

The copies, the decoding and the numerics are those of :mod:`sglang_modelopt_kernels.gemm.w4_stream.kernel`. An expert's K is short,
a few tiles: a program goes on to the next 64 output features, whose first tiles are on their way by then: copies never pause.

Which weight a program reads, the table of pairs says. Where it was complete before the kernel ahead of this one began, weights are
fetched before that kernel has ended (KNOWN). The pairs of a single token need no table: each has a block of its own (SINGLE).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from sglang_modelopt_kernels.early import after_previous
from sglang_modelopt_kernels.gemm.common.kernel import steps_of, store_tile
from sglang_modelopt_kernels.gemm.w4_stream.kernel import (
    bytes_layout,
    e4m3_operand,
    fetch_weight,
    float16_operand,
    scales_layout,
    tokens_layout,
)


@gluon.jit
def _next(tile, place, steps, below):
    """Return the tile after the ``place``-th along K, and its place: behind the last, the first one ``below`` tiles on."""
    last = place + 1 == steps
    return gl.where(last, tile - place + below, tile + 1), gl.where(last, 0, place + 1)


@gluon.jit
def _pairs_of(pairs_ptr, block, pairs, SINGLE: gl.constexpr, BM: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the pairs of a block; ``pairs`` where it has none."""
    place = gl.arange(0, BM, layout=LAYOUT)
    if SINGLE:
        pair = gl.where(place == 0, block, pairs)
    else:
        pair = gl.load(pairs_ptr + block.to(gl.int64) * BM + place)
    return pair


@gluon.jit
def _fetch_rows(x_s, x_at, there, offset, stage):
    """Copy 256 K elements from ``offset`` on of the rows at ``x_at``; those that are not ``there`` become zeros."""
    async_copy.async_copy_global_to_shared(x_s.index(stage), x_at + offset, mask=there)


@gluon.jit
def _multiply(acc, w_s, s_s, x, place, FP8: gl.constexpr, BLOCKS: gl.constexpr, MMA: gl.constexpr, BM: gl.constexpr):
    """Decode the tile at ``place``, multiply it by ``x``, 256 K elements of some pairs, and add that to ``acc``."""
    codes = w_s.index(place).load(bytes_layout(16))
    scales = gl.expand_dims(s_s.index(place).load(gl.SliceLayout(1, scales_layout(BLOCKS))), 1)
    scales = scales.broadcast_to([64 * BLOCKS, 4])
    fence_async_shared()
    # The product is waited for where it is issued: nothing overwrites its operand in registers (see gemm/common/wgmma.py).
    if FP8:
        unit = e4m3_operand(codes, scales, gl.DotOperandLayout(0, MMA, 4))
        acc += warpgroup_mma(unit, x, gl.zeros((64, BM), gl.float32, MMA), use_acc=False, is_async=False)
    else:
        unit = float16_operand(codes, scales, gl.DotOperandLayout(0, MMA, 2), BLOCKS)
        acc = warpgroup_mma(unit, x, acc, is_async=False)
    return acc


@gluon.jit
def _store_nothing(y_ptr, pair, first, tiles, pairs, n, LAYOUT: gl.constexpr):
    """Write zeros to ``tiles`` tiles of outputs of some pairs, from output ``first`` on."""
    at = pair.to(gl.int64)[:, None] * n
    for tile in range(tiles):
        output = first + tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, LAYOUT))
        gl.store(y_ptr + at + output[None, :], 0.0, mask=(pair < pairs)[:, None] & (output >= 0)[None, :])


@gluon.jit(do_not_specialize=["pairs", "share", "scale_share", "experts", "rows"])
def streamed_experts_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    pairs_ptr,
    owner_ptr,
    row_scale_ptr,
    out_scale_ptr,
    y_ptr,
    partial_ptr,
    arrivals_ptr,
    pairs,
    share,
    scale_share,
    experts,
    rows,
    n,
    k,
    FP8: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    DESCALE: gl.constexpr,
    HAS_ROW_SCALE: gl.constexpr,
    SPLIT_K: gl.constexpr,
    KNOWN: gl.constexpr,
    SINGLE: gl.constexpr,
    PDL: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
):
    """Compute ``rows`` tiles of BN outputs for a block of BM pairs, or with SPLIT_K > 1 a part of their sums.

    With SINGLE a block has the one pair of its number, and its owner is that pair's expert, invalid ones included. Pair ``r`` reads
    row ``r // share`` of ``x`` and ``r // scale_share`` of ``row_scale``. Blocks of pairs are the fastest grid axis: those of one
    expert share its weight in L2. STAGES tiles are on their way or in use at a time. ``n`` is a multiple of 64, ``k`` one of 256.
    FP8, BLOCKS and DESCALE are those of the streamed kernel of one weight.
    """
    gl.static_assert(gl.num_warps() == 4 and BN == 64)
    SCALES: gl.constexpr = 64 * BLOCKS
    ITEM: gl.constexpr = 1 if FP8 else 2
    X_COPY: gl.constexpr = tokens_layout(ITEM)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 32 // ITEM])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    w_s = gl.allocate_shared_memory(gl.uint8, [STAGES, 8192], FLAT)
    s_s = gl.allocate_shared_memory(gl.uint8, [STAGES, SCALES], FLAT)
    x_s = gl.allocate_shared_memory(
        gl.float8e4nv if FP8 else gl.float16, [STAGES, BM, 256], gl.NVMMASharedLayout(128, 8 * ITEM, 2)
    )

    block = gl.program_id(0)
    if not KNOWN:
        after_previous(PDL)
    owner = gl.load(owner_ptr + block)
    if SINGLE:
        owner = gl.where((owner >= 0) & (owner < experts), owner, experts)
    if owner < 0:
        return
    tiles = n // BN
    row = gl.program_id(1) * rows
    rows = gl.minimum(rows, tiles - row)
    pair = _pairs_of(pairs_ptr, block, pairs, SINGLE, BM, gl.SliceLayout(1, X_COPY))
    if owner == experts:
        if KNOWN:
            after_previous(PDL)
        _store_nothing(y_ptr, pair, row * BN, rows, pairs, n, X_COPY)
        return
    split = gl.program_id(2)
    every = k // 256
    first, steps = steps_of(k, split, 256, SPLIT_K)
    # The tiles of adjacent outputs follow each other: without splits, a program reads one piece of memory.
    base = (owner * tiles + row) * every + first
    total = rows * steps

    tile, place = base, 0
    for stage in gl.static_range(STAGES - 1):
        if stage < total:
            fetch_weight(w_s, s_s, w_ptr, s_ptr, tile, stage, SCALES)
        tile, place = _next(tile, place, steps, every)
    async_copy.commit_group()
    if KNOWN:
        after_previous(PDL)
    column = gl.arange(0, 256, layout=gl.SliceLayout(0, X_COPY))
    there = (pair < pairs)[:, None] & (column >= 0)[None, :]
    x_at = x_ptr + (gl.minimum(pair, pairs - 1) // share).to(gl.int64)[:, None] * k + column[None, :]
    place = 0
    for stage in gl.static_range(STAGES - 1):
        if stage < total:
            _fetch_rows(x_s, x_at, there, (first + place) * 256, stage)
        async_copy.commit_group()
        _, place = _next(base, place, steps, every)

    used, free, ahead = 0, STAGES - 1, STAGES - 1
    for part in range(rows):
        acc = gl.zeros((64, BM), gl.float32, MMA)
        for _ in range(steps):
            # All but the newest STAGES - 2 groups have arrived, those of this step for every thread; the oldest stage is free.
            async_copy.wait_group(STAGES - 2)
            gl.barrier()
            if ahead < total:
                fetch_weight(w_s, s_s, w_ptr, s_ptr, tile, free, SCALES)
                _fetch_rows(x_s, x_at, there, (first + place) * 256, free)
            async_copy.commit_group()
            ahead += 1
            tile, place = _next(tile, place, steps, every)
            x = x_s.index(used).permute([1, 0])
            acc = _multiply(acc, w_s, s_s, x, used, FP8, BLOCKS, MMA, BM)
            used = gl.where(used == STAGES - 1, 0, used + 1)
            free = gl.where(free == STAGES - 1, 0, free + 1)
        member = _pairs_of(pairs_ptr, block, pairs, SINGLE, BM, gl.SliceLayout(0, MMA))
        if HAS_ROW_SCALE:
            scale = gl.load(row_scale_ptr + gl.minimum(member, pairs - 1) // scale_share)
            acc *= scale[None, :]
        store_tile(
            acc,
            y_ptr,
            partial_ptr,
            arrivals_ptr,
            (row + part) * BN + gl.arange(0, 64, layout=gl.SliceLayout(1, MMA)),
            member,
            block * tiles + row + part,
            split,
            pairs,
            n,
            row_scale_ptr,
            out_scale_ptr + owner.to(gl.int64) * n,
            out_scale_ptr,
            1,
            DESCALE,
            False,
            False,
            SPLIT_K,
        )
