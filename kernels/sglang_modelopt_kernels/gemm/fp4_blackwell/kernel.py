"""``Y^T = W X^T`` of E2M1 codes on both sides: the matrix instruction reads codes and block scales as stored.

A block is 16 K elements under E4M3 or 32 under UE8M0. Every product is exact (two codes and two E4M3 scales have twelve significant
bits); the scales of whole tensors come after the sum. This kernel is for SM120, which reads scales from registers, not
swizzled; :mod:`..blackwell_common` has the kernel of SM100 and SM103.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.gemm.blackwell_common.kernel import dot_e4m3_scales
from sglang_modelopt_kernels.gemm.common.kernel import store_tile


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
    partial_ptr,
    arrivals_ptr,
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
    """Compute one ``[BN, BM]`` tile of ``Y^T``, or with SPLIT_K > 1 a part of its sum; see :func:`store_tile`.

    Codes ``x`` and ``w`` have the block scales ``t`` and ``s``.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    # Rows and tokens out of range read the last one: no mask in the loop, and their results are not stored.
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
            acc = dot_e4m3_scales(w, s, x, t, acc, BN, BM, BK // GROUP)
        else:
            acc = tl.dot_scaled(w, s, "e2m1", x, t, "e2m1", acc)
    store_tile(
        acc,
        y_ptr,
        partial_ptr,
        arrivals_ptr,
        rows,
        tokens,
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
