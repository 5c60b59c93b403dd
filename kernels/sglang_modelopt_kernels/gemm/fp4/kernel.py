"""``Y^T = W X^T`` with both sides as stored: the matrix instruction reads E2M1 codes and their block scales.

Blocks are 16 inputs under E4M3 or 32 under UE8M0. The weight is the operand of 128 rows, because decoding has few tokens, which
leave tcgen05 as rows. Every product is exact (two codes and two E4M3 scales have twelve significant bits); the scales of whole
tensors come after the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.gemm.tile.kernel import store_tile


@triton.jit
def _halves(codes):
    """Packed codes as the float32 values of the low and of the high one."""
    return _value(codes & 15), _value(codes >> 4)


@triton.jit
def _value(code):
    m = (code & 7).to(tl.int32)
    normal = ((m << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    magnitude = tl.where(m >= 2, normal, m.to(tl.float32) * 0.5)
    return tl.where(code >= 8, -magnitude, magnitude)


@triton.jit
def _dot_e4m3_scales(w, s, x, t, acc, BN: tl.constexpr, BM: tl.constexpr, BLOCKS: tl.constexpr):
    """As ``dot_scaled`` under E4M3 scales, which Triton's interpreter reads as UE8M0: a product for each half of the bytes."""
    wide = tl.reshape(tl.broadcast_to(s.to(tl.float32)[:, :, None], (BN, BLOCKS, 8)), (BN, BLOCKS * 8))
    other = tl.reshape(tl.broadcast_to(t.to(tl.float32)[:, :, None], (BM, BLOCKS, 8)), (BM, BLOCKS * 8))
    other = tl.trans(other)
    w_low, w_high = _halves(w)
    x_low, x_high = _halves(x)
    acc = tl.dot(w_low * wide, x_low * other, acc, input_precision="ieee")
    return tl.dot(w_high * wide, x_high * other, acc, input_precision="ieee")


@triton.jit
def fp4_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    t_ptr,
    row_scale_ptr,
    out_scale_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    row_step,
    GROUP: tl.constexpr,
    NATIVE: tl.constexpr,
    DESCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """One ``[BN, BM]`` tile of ``Y^T``, or with SPLIT_K > 1 one float32 partial of it, unscaled, in ``y[split, m, n]``.

    Codes ``x`` and ``w`` have the block scales ``t`` and ``s``.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    # Out of range rows and tokens read the last one: no mask in the loop, and nothing of theirs is stored.
    row = tl.minimum(rows, n - 1).to(tl.int64)
    token = tl.minimum(tokens, m - 1).to(tl.int64)
    pair = tl.arange(0, BK // 2)
    block = tl.arange(0, BK // GROUP)

    steps = tl.cdiv(tl.cdiv(k, BK), SPLIT_K)
    start = split * steps * BK
    end = tl.minimum(start + steps * BK, k)
    acc = tl.zeros((BN, BM), tl.float32)
    for offset in range(start, end, BK):
        w_at = w_ptr + row[:, None] * (k // 2) + (offset // 2 + pair)[None, :]
        s_at = s_ptr + row[:, None] * (k // GROUP) + (offset // GROUP + block)[None, :]
        x_at = x_ptr + token[None, :] * (k // 2) + (offset // 2 + pair)[:, None]
        t_at = t_ptr + token[:, None] * (k // GROUP) + (offset // GROUP + block)[None, :]
        if EVEN_K:
            w = tl.load(w_at)
            s = tl.load(s_at)
            x = tl.load(x_at)
            t = tl.load(t_at)
        else:
            # Codes past the end are zero, and so are their scales: zero in E4M3, 2^-127 in UE8M0.
            w = tl.load(w_at, mask=(offset + 2 * pair < k)[None, :], other=0)
            s = tl.load(s_at, mask=(offset + GROUP * block < k)[None, :], other=0.0)
            x = tl.load(x_at, mask=(offset + 2 * pair < k)[:, None], other=0)
            t = tl.load(t_at, mask=(offset + GROUP * block < k)[None, :], other=0.0)
        if GROUP == 16 and not NATIVE:
            acc = _dot_e4m3_scales(w, s, x, t, acc, BN, BM, BK // GROUP)
        else:
            acc = tl.dot_scaled(w, s, "e2m1", x, t, "e2m1", acc)
    store_tile(
        acc,
        y_ptr,
        rows,
        tokens,
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
