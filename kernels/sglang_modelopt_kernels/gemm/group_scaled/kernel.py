"""``Y^T = W X^T`` over decoded weights with a scale for each group of K elements: each group's sum is scaled and added in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.gemm.common.kernel import store_tile


@triton.jit
def group_scaled_kernel(
    x_ptr,
    u_ptr,
    s_ptr,
    row_scale_ptr,
    out_scale_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    first,
    count,
    row_step,
    GROUP: tl.constexpr,
    ASM: tl.constexpr,
    DESCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute one ``[BN, BM]`` tile of ``Y^T`` from ``count`` decoded rows ``u`` of the weight, rows ``first ..``.

    ``count`` is a multiple of BN except for the last rows, K a multiple of GROUP, and GROUP a multiple of BK.
    """
    tiles = tl.cdiv(count, BN)
    in_group = WIDTH * tl.cdiv(m, BM)
    start = tl.program_id(0) // in_group * WIDTH
    width = tl.minimum(tiles - start, WIDTH)
    within = tl.program_id(0) % in_group
    rows = (start + within % width) * BN + tl.arange(0, BN)
    tokens = within // width * BM + tl.arange(0, BM)
    # Rows and tokens out of range read the last one, and their results are not stored.
    row = tl.minimum(rows, count - 1).to(tl.int64)
    token = tl.minimum(tokens, m - 1).to(tl.int64)
    offs_k = tl.arange(0, BK)
    u_at = u_ptr + row[:, None] * k + offs_k[None, :]
    x_at = x_ptr + token[None, :] * k + offs_k[:, None]
    s_at = s_ptr + (first + row) * (k // GROUP)
    acc = tl.zeros((BN, BM), tl.float32)
    prefetched = tl.load(s_at)
    for offset in range(0, k, BK):
        u = tl.load(u_at + offset)
        x = tl.load(x_at + offset)
        # Prefetch the next scale: Triton only pipelines loads that feed `tl.dot`.
        scale = prefetched
        prefetched = tl.load(s_at + tl.minimum(offset + BK, k - BK) // GROUP)
        if not ASM:
            # Triton's interpreter multiplies the raw bits of operands that are not fp32.
            u, x = u.to(tl.float32), x.to(tl.float32)
        acc += tl.dot(u, x, input_precision="ieee") * scale[:, None]
    store_tile(
        acc,
        y_ptr,
        y_ptr,
        y_ptr,
        first + rows,
        tokens,
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
        1,
    )
