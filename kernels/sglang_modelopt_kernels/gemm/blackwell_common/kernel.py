"""``Y^T = W X^T`` in the block-scaled matrix instructions of tcgen05: E2M1 weights, E2M1 or E4M3 activations.

The weight is the operand of 128 rows, because decoding has few tokens. Its block scales have the 128x4 swizzled layout
(:func:`naive_swizzle`), which ``tcgen05.cp`` copies from shared to tensor memory without passing through registers; so have those
of the activations where a tile has 128 tokens or more. Operands are loaded through TMA descriptors (DESCRIBED), or through
pointers where TMA does not support a row's length or an address. E4M3 activations have no block scales and get a tensor of ones:
without it Triton decomposes the product into fp16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.gemm.common.kernel import store_tile


@triton.jit
def _value(code):
    """Decode E2M1 codes to fp32."""
    m = (code & 7).to(tl.int32)
    normal = ((m << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    magnitude = tl.where(m >= 2, normal, m.to(tl.float32) * 0.5)
    return tl.where(code >= 8, -magnitude, magnitude)


@triton.jit
def _halves(codes):
    """Decode bytes of two E2M1 codes to the fp32 values of the low and of the high one."""
    return _value(codes & 15), _value(codes >> 4)


@triton.jit
def dot_e4m3_scales(w, s, x, t, acc, BN: tl.constexpr, BM: tl.constexpr, BLOCKS: tl.constexpr):
    """Emulate ``tl.dot_scaled`` of E2M1 under E4M3 scales, which Triton's interpreter reads as UE8M0.

    There is one fp32 product for the low and one for the high codes of the bytes.
    """
    w_scale = tl.reshape(tl.broadcast_to(s.to(tl.float32)[:, :, None], (BN, BLOCKS, 8)), (BN, BLOCKS * 8))
    x_scale = tl.reshape(tl.broadcast_to(t.to(tl.float32)[:, :, None], (BM, BLOCKS, 8)), (BM, BLOCKS * 8))
    x_scale = tl.trans(x_scale)
    w_low, w_high = _halves(w)
    x_low, x_high = _halves(x)
    acc = tl.dot(w_low * w_scale, x_low * x_scale, acc, input_precision="ieee")
    return tl.dot(w_high * w_scale, x_high * x_scale, acc, input_precision="ieee")


@triton.jit
def load_rows(
    source, first, at, rows, width, DESCRIBED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Load entries ``at .. at + WIDTH`` of rows ``first .. first + ROWS`` of ``source`` ``[rows, width]``, zero past the width.

    Past the last row a descriptor reads zeros and a pointer the last row; their results are not stored.
    """
    if DESCRIBED:
        tile = source.load([first, at])
    else:
        row = tl.minimum(first + tl.arange(0, ROWS), rows - 1).to(tl.int64)
        entry = at + tl.arange(0, WIDTH)
        place = source + row[:, None] * width + entry[None, :]
        if EVEN:
            tile = tl.load(place)
        else:
            tile = tl.load(place, mask=(entry < width)[None, :], other=0.0)
    return tile


@triton.jit
def load_swizzled(
    source,
    first,
    at,
    rows,
    columns,
    DESCRIBED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Load block scales ``[ROWS, BLOCKS]`` at row ``first`` and block ``at`` from the 128x4 swizzled layout of ``columns`` tiles.

    Scales past the last column are zero; those past the last of ``rows`` are zero or belong to other rows.
    """
    if DESCRIBED:
        tile = source.load([first // 128, at // 4, 0, 0])
    else:
        down = tl.minimum(first // 128 + tl.arange(0, ROWS // 128), (rows - 1) // 128).to(tl.int64)
        across = at * 128 + tl.arange(0, BLOCKS * 128)
        place = source + down[:, None] * columns * 512 + across[None, :]
        if EVEN:
            tile = tl.load(place)
        else:
            tile = tl.load(place, mask=(across < columns * 512)[None, :], other=0.0)
    # Byte 16 (r % 32) + 4 (r / 32) + c of a swizzled tile is the scale of its row r and block c.
    return tile.reshape(ROWS // 128, BLOCKS // 4, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(ROWS, BLOCKS)


@triton.jit
def tcgen05_sum(
    x,
    w,
    s,
    t,
    row,
    token,
    m,
    n,
    k,
    start,
    end,
    X: tl.constexpr,
    GROUP: tl.constexpr,
    NATIVE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SWIZZLED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Multiply BN rows of the weight from ``row`` by BM tokens from ``token`` over K ``start .. end``: ``[BN, BM]``."""
    PER_BYTE: tl.constexpr = 2 if X == "e2m1" else 1
    BLOCKS: tl.constexpr = BK // GROUP
    blocks = k // GROUP
    columns = tl.cdiv(blocks, 4)
    acc = tl.zeros((BN, BM), tl.float32)
    for offset in range(start, end, BK):
        codes = load_rows(w, row, offset // 2, n, k // 2, DESCRIBED, EVEN_K, BN, BK // 2)
        values = load_rows(x, token, offset // PER_BYTE, m, k // PER_BYTE, DESCRIBED, EVEN_K, BM, BK // PER_BYTE)
        scale = load_swizzled(s, row, offset // GROUP, n, columns, DESCRIBED, EVEN_K, BN, BLOCKS)
        if X == "e4m3":
            other = tl.full((BM, BLOCKS), 127, tl.uint8)  # 2^0
        elif SWIZZLED:
            other = load_swizzled(t, token, offset // GROUP, m, columns, DESCRIBED, EVEN_K, BM, BLOCKS)
        else:
            # Through pointers: a few scales of a few tokens, in rows of any length.
            other = load_rows(t, token, offset // GROUP, m, blocks, False, EVEN_K, BM, BLOCKS)
        if GROUP == 16 and not NATIVE:
            acc = dot_e4m3_scales(codes, scale, values.T, other, acc, BN, BM, BLOCKS)
        else:
            acc = tl.dot_scaled(codes, scale, "e2m1", values.T, other, X, acc)
    return acc


@triton.jit
def tcgen05_kernel(
    x,
    w,
    s,
    t,
    row_scale_ptr,
    out_scale_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    arrivals_ptr,
    m,
    n,
    k,
    row_step,
    X: tl.constexpr,
    GROUP: tl.constexpr,
    NATIVE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SWIZZLED: tl.constexpr,
    PERSISTENT: tl.constexpr,
    HEIGHT: tl.constexpr,
    DESCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute one ``[BN, BM]`` tile of ``Y^T``, or with SPLIT_K > 1 a part of its sum; see :func:`store_tile`.

    With PERSISTENT a program computes every ``num_programs``-th of all tiles, without splits; HEIGHT row tiles pass through all
    tokens before the next ones. ``w`` and, for ``X`` "e2m1", ``x`` are packed codes; ``s`` has the weight's block scales
    swizzled, ``t`` those of the activations, swizzled with SWIZZLED, else ``[M, K / GROUP]``.
    """
    if PERSISTENT:
        down, across = tl.cdiv(n, BN), tl.cdiv(m, BM)
        for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0)):
            group = tile // (HEIGHT * across)
            height = tl.minimum(down - group * HEIGHT, HEIGHT)
            inside = tile % (HEIGHT * across)
            row = (group * HEIGHT + inside % height) * BN
            token = inside // height * BM
            acc = tcgen05_sum(
                x, w, s, t, row, token, m, n, k, 0, k, X, GROUP, NATIVE, DESCRIBED, SWIZZLED, EVEN_K, BN, BM, BK
            )
            # Store in quarters: the addresses of a whole tile do not fit in registers beside it.
            low, high = acc.reshape(BN, 2, BM // 2).permute(0, 2, 1).split()
            q0, q1 = low.reshape(BN, 2, BM // 4).permute(0, 2, 1).split()
            q2, q3 = high.reshape(BN, 2, BM // 4).permute(0, 2, 1).split()
            for part in tl.static_range(4):
                store_tile(
                    q0 if part == 0 else q1 if part == 1 else q2 if part == 2 else q3,
                    y_ptr,
                    partial_ptr,
                    arrivals_ptr,
                    row + tl.arange(0, BN),
                    token + part * (BM // 4) + tl.arange(0, BM // 4),
                    0,
                    0,
                    m,
                    n,
                    row_scale_ptr,
                    out_scale_ptr,
                    bias_ptr,
                    row_step,
                    DESCALE,
                    HAS_ROW_SCALE,
                    HAS_BIAS,
                    SPLIT_K,
                )
    else:
        row, token, split = tl.program_id(0) * BN, tl.program_id(1) * BM, tl.program_id(2)
        steps = tl.cdiv(tl.cdiv(k, BK), SPLIT_K)
        start = split * steps * BK
        end = tl.minimum(start + steps * BK, k)
        acc = tcgen05_sum(
            x, w, s, t, row, token, m, n, k, start, end, X, GROUP, NATIVE, DESCRIBED, SWIZZLED, EVEN_K, BN, BM, BK
        )
        store_tile(
            acc,
            y_ptr,
            partial_ptr,
            arrivals_ptr,
            row + tl.arange(0, BN),
            token + tl.arange(0, BM),
            tl.program_id(0) * tl.num_programs(1) + tl.program_id(1),
            split,
            m,
            n,
            row_scale_ptr,
            out_scale_ptr,
            bias_ptr,
            row_step,
            DESCALE,
            HAS_ROW_SCALE,
            HAS_BIAS,
            SPLIT_K,
        )
