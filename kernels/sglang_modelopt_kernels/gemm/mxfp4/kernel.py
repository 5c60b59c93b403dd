"""``Y^T = W X^T`` with the weight as stored: the matrix instruction reads E2M1 codes, E4M3 activations and UE8M0 block scales.

The weight is the operand of 128 rows, because decoding has few tokens, which leave tcgen05 as rows. Activations get unit block
scales as a tensor: without one Triton decomposes the product into float16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.gemm.tile.kernel import store_tile


@triton.jit
def mxfp4_sum(
    x_ptr,
    w_ptr,
    s_ptr,
    row,
    token,
    k,
    start,
    end,
    EVEN_K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows ``row`` of the weight times rows ``token`` of ``x`` (int64), inputs ``start .. end``: ``[BN, BM]``."""
    pair = tl.arange(0, BK // 2)
    block = tl.arange(0, BK // 32)
    input_ = tl.arange(0, BK)
    unit = tl.full((BM, BK // 32), 127, tl.uint8)  # 2^0
    acc = tl.zeros((BN, BM), tl.float32)
    for offset in range(start, end, BK):
        w_at = w_ptr + row[:, None] * (k // 2) + (offset // 2 + pair)[None, :]
        s_at = s_ptr + row[:, None] * (k // 32) + (offset // 32 + block)[None, :]
        x_at = x_ptr + token[None, :] * k + (offset + input_)[:, None]
        if EVEN_K:
            w = tl.load(w_at)
            s = tl.load(s_at)
            x = tl.load(x_at)
        else:
            w = tl.load(w_at, mask=(offset + 2 * pair < k)[None, :], other=0)
            s = tl.load(s_at, mask=(offset + 32 * block < k)[None, :], other=127)
            x = tl.load(x_at, mask=(offset + input_ < k)[:, None], other=0.0)
        acc = tl.dot_scaled(w, s, "e2m1", x, unit, "e4m3", acc)
    return acc


@triton.jit
def mxfp4_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    row_scale_ptr,
    out_scale_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    row_step,
    DESCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """One ``[BN, BM]`` tile of ``Y^T``, or with SPLIT_K > 1 one float32 partial of it, unscaled, in ``y[split, m, n]``."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    # Out of range rows and tokens read the last one: no mask in the loop, and nothing of theirs is stored.
    row = tl.minimum(rows, n - 1).to(tl.int64)
    token = tl.minimum(tokens, m - 1).to(tl.int64)
    steps = tl.cdiv(tl.cdiv(k, BK), SPLIT_K)
    start = split * steps * BK
    end = tl.minimum(start + steps * BK, k)
    acc = mxfp4_sum(x_ptr, w_ptr, s_ptr, row, token, k, start, end, EVEN_K, BN, BM, BK)
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
