"""``Y^T = W X^T`` in FP8 matrix instructions; E2M1 codes and their block exponents become E4M3 weights in registers.

The eight magnitudes under one exponent are eight bytes, of which ``prmt`` picks four at a time with the codes as selectors. The
weight is the left operand, with the long side, because decoding has few tokens. Every product is exact; each step of BK products is
summed by the matrix instruction, which keeps fewer bits than fp32 (on Hopper about 13), and added to the rest in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.early import after_previous
from sglang_modelopt_kernels.gemm.common.kernel import (
    rotated,
    steps_of,
    store_tile,
    tokens_first,
)

FOLD: tl.constexpr = tl.constexpr(
    """{ .reg .b32 e, a, b, c;
    and.b32 e, $3, 0xff;
    mad.lo.u32 a, e, 0x08080800, 0x0c080000;
    mad.lo.u32 b, e, 0x08080808, 0x1c181410;
    and.b32 c, $2, 0x77777777;
    prmt.b32 e, a, b, c;
    shr.u32 c, c, 16;
    prmt.b32 a, a, b, c;
    shl.b32 b, $2, 4;
    lop3.b32 $0, b, 0x80808080, e, 0xea;
    lop3.b32 $1, $2, 0x80808080, a, 0xea; }"""
)
"""Converts a word of eight codes and its exponent to two words of four E4M3 values."""


_FOLD_ROW = """and.b32 e, {exponent}, 0xff;
    mad.lo.u32 a, e, 0x08080800, 0x0c080000;
    mad.lo.u32 b, e, 0x08080808, 0x1c181410;
    and.b32 c, {word}, 0x77777777;
    prmt.b32 e, a, b, c;
    shr.u32 c, c, 16;
    prmt.b32 a, a, b, c;
    shl.b32 b, {word}, 4;
    lop3.b32 {low}, b, 0x80808080, e, 0xea;
    lop3.b32 {high}, {word}, 0x80808080, a, 0xea;"""
FOLD_FRAGMENT: tl.constexpr = tl.constexpr(
    "{ .reg .b32 e, a, b, c;\n"
    + _FOLD_ROW.format(word="$4", exponent="$8", low="$0", high="$2")
    + _FOLD_ROW.format(word="$5", exponent="$9", low="$1", high="$3")
    + " }"
)
"""Converts a thread's part of 16 rows and 32 K elements in the order of the matrix instruction: four K elements of one row, of the
row 8 below, and of both rows 16 K elements on. One word of codes makes both parts of its row."""


@triton.jit
def folded_e4m3(codes, exponent, ASM: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Convert packed codes (``packing.py``) ``[ROWS, 16 BLOCKS]`` under exponents ``[ROWS, BLOCKS]`` to E4M3 ``[ROWS, 32 BLOCKS]``.

    The assembly is correct only where the result is a matrix instruction's operand in registers (``benchmarks.aot`` checks). Each
    half of a block gets the same word of codes, so that nothing moves between threads.
    """
    if ASM:
        half = tl.reshape(codes, (ROWS, BLOCKS, 1, 16))
        word = tl.reshape(tl.broadcast_to(half, (ROWS, BLOCKS, 2, 16)), (ROWS, 32 * BLOCKS))
        spread = tl.reshape(tl.broadcast_to(exponent[:, :, None], (ROWS, BLOCKS, 32)), (ROWS, 32 * BLOCKS))
        bits = tl.inline_asm_elementwise(
            FOLD_FRAGMENT, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r", args=[word, spread], dtype=tl.uint8, is_pure=True, pack=16
        )
    else:
        word = tl.reshape(codes, (ROWS, BLOCKS * 4, 2, 2))
        even, odd = tl.split(word)  # bytes 0 and 2, 1 and 3
        even, odd = tl.permute(even, (0, 2, 1)), tl.permute(odd, (0, 2, 1))
        # K element 4 q + i has its magnitude in nibble i of the word: the low nibble of a byte comes before the high one.
        first, second = tl.split(tl.permute(even, (0, 2, 1)))
        third, fourth = tl.split(tl.permute(odd, (0, 2, 1)))
        low = _in_order(first & 7, first >> 4 & 7, third & 7, third >> 4 & 7, ROWS, BLOCKS * 16)
        high = _in_order(second & 7, second >> 4 & 7, fourth & 7, fourth >> 4 & 7, ROWS, BLOCKS * 16)
        spread = tl.reshape(tl.broadcast_to(exponent[:, :, None], (ROWS, BLOCKS, 16)), (ROWS, 16 * BLOCKS))
        low = _fold(low, spread) | ((codes & 0x08) << 4)
        high = _fold(high, spread) | (codes & 0x80)
        both = tl.join(tl.reshape(low, (ROWS, BLOCKS, 16)), tl.reshape(high, (ROWS, BLOCKS, 16)))
        bits = tl.reshape(tl.permute(both, (0, 1, 3, 2)), (ROWS, 32 * BLOCKS))
    return bits.to(tl.float8e4nv, bitcast=True)


@triton.jit
def _in_order(a, b, c, d, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Interleave four tensors ``[ROWS, BYTES / 4]``, entry by entry."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, BYTES))


@triton.jit
def _fold(magnitude, exponent):
    """Convert E2M1 magnitudes 0..7 under exponents 1..12 to E4M3 bytes."""
    base = tl.where(magnitude >= 2, magnitude << 2, 0)
    return tl.where(magnitude == 0, 0, base + (exponent << 3)).to(tl.uint8)


@triton.jit
def rows_of_tile(w, s):
    """Put the bytes ``[64, 128]`` and exponents ``[64, 8]`` of a tile into the order of its rows; nothing moves between threads."""
    w = tl.permute(tl.reshape(w, (2, 2, 4, 8, 4, 4, 4)), (2, 1, 3, 0, 5, 4, 6))  # from (b2, r3, w, r, q, j, byte)
    s = tl.permute(tl.reshape(s, (4, 8, 2, 8)), (0, 2, 1, 3))  # from (w, r, r3, block)
    return tl.reshape(w, (64, 128)), tl.reshape(s, (64, 8))


@triton.jit
def folded_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
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
    ASM: tl.constexpr,
    TILED: tl.constexpr,
    DESCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute one ``[BN, BM]`` tile of ``Y^T``, or with SPLIT_K > 1 a part of its sum; see :func:`store_tile`.

    With TILED the weight is that of :mod:`sglang_modelopt_kernels.gemm.w4_stream`, tiles of 64 rows and 256 K elements.
    """
    tile, part = tokens_first()
    rows = tile * BN + tl.arange(0, BN)
    tokens = part * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    # Rows out of range read the last one: no mask in the loop, and their results are not stored.
    row = tl.minimum(rows, n - 1).to(tl.int64)
    token = tl.minimum(tokens, m - 1).to(tl.int64)
    byte = tl.arange(0, BK // 2)
    block = tl.arange(0, BK // 32)
    offs_k = tl.arange(0, BK)

    row_bytes, blocks = k // 2, k // 32
    if EVEN_K:
        # A hint for the compiler, which pipelines no loads of less than four bytes for a thread.
        row_bytes = tl.multiple_of(row_bytes, BK // 2)
        blocks = tl.multiple_of(blocks, BK // 32)
    first, steps = steps_of(k, split, BK, SPLIT_K)
    after_previous(PDL)
    begin = tile % tl.maximum(steps, 1)
    known = (tokens < m)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(steps):
        place = first + rotated(step, begin, steps)
        offset = place * BK
        if TILED:
            tl.static_assert(EVEN_K and BN == 64 and BK == 256)
            at = (tile * (k // BK) + place).to(tl.int64)
            lines = tl.arange(0, 64)[:, None]
            w_at = w_ptr + at * 8192 + lines * 128 + byte[None, :]
            s_at = s_ptr + at * 512 + lines * 8 + block[None, :]
        else:
            w_at = w_ptr + row[:, None] * row_bytes + (offset // 2 + byte)[None, :]
            s_at = s_ptr + row[:, None] * blocks + (offset // 32 + block)[None, :]
        x_at = x_ptr + token[None, :] * k + (offset + offs_k)[:, None]
        if EVEN_K:
            w = tl.load(w_at)
            s = tl.load(s_at)
            # Tokens out of range are not read: those of all programs would be the same few lines of L2.
            x = tl.load(x_at) if EVEN_M else tl.load(x_at, mask=known, other=0.0)
        else:
            # K is a multiple of the block.
            w = tl.load(w_at, mask=(offset + 2 * byte < k)[None, :], other=0)
            s = tl.load(s_at, mask=(offset + 32 * block < k)[None, :], other=1)
            x = tl.load(x_at, mask=(offset + offs_k < k)[:, None] & known, other=0.0)
        if TILED:
            w, s = rows_of_tile(w, s)
        unit = folded_e4m3(w, s, ASM, BN, BK // 32)
        if not ASM:
            # Triton's interpreter multiplies the raw bits of E4M3 operands: give it the same values in fp32.
            unit, x = unit.to(tl.float32), x.to(tl.float32)
        acc += tl.dot(unit, x, input_precision="ieee")
    store_tile(
        acc,
        y_ptr,
        partial_ptr,
        arrivals_ptr,
        rows,
        tokens,
        tile * tl.num_programs(1) + part,
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


@triton.jit
def fold_words(word, exponent, ASM: tl.constexpr):
    """Convert words of eight codes and their exponents, int32, to two words of four E4M3 values each."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            FOLD, "=&r,=r,r,r", args=[word, exponent], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        low = (word & 0x08080808) << 4
        high = word & -0x7F7F7F80  # 0x80808080
        for nibble in tl.static_range(4):
            low |= _fold(word >> 4 * nibble & 7, exponent).to(tl.int32) << 8 * nibble
            high |= _fold(word >> 16 + 4 * nibble & 7, exponent).to(tl.int32) << 8 * nibble
    return low, high


@triton.jit
def unfold_kernel(w_ptr, s_ptr, y_ptr, first, n, k, ASM: tl.constexpr, BN: tl.constexpr):
    """Decode rows ``first .. first + n`` of the unit weight to E4M3, ``[n, K]``, 512 K elements a program.

    Codes and values are loaded and stored as int32 words: the compiler chooses the register order of single bytes.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row = (first + tl.minimum(rows, n - 1)).to(tl.int64)
    word = tl.program_id(1) * 64 + tl.arange(0, 64)
    inside = (rows < n)[:, None] & (word < k // 8)[None, :]
    w = tl.load(w_ptr + row[:, None] * (k // 8) + word[None, :], mask=inside, other=0)
    exponent = tl.load(s_ptr + row[:, None] * (k // 32) + (word // 4)[None, :], mask=inside, other=1)
    low, high = fold_words(w, exponent.to(tl.int32), ASM)
    # Of each block of four words the low halves come first, stored together, 16 bytes at a time.
    both = tl.permute(tl.reshape(tl.join(low, high), (BN, 16, 4, 2)), (0, 1, 3, 2))
    out = tl.program_id(1) * 128 + tl.arange(0, 128)
    at = y_ptr + rows.to(tl.int64)[:, None] * (k // 4) + out[None, :]
    tl.store(at, tl.reshape(both, (BN, 128)), mask=(rows < n)[:, None] & (out < k // 4)[None, :])
