"""``Y^T = W X^T`` over decoded weights whose inputs are scaled in groups: the sum of each group is scaled and added in float32."""

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
    """One ``[BN, BM]`` tile of ``Y^T`` from ``count`` decoded rows ``u``, which are those from ``first`` on of the weight.

    ``count`` is a multiple of BN unless they are the last, K one of GROUP, and GROUP one of BK.
    """
    tiles = tl.cdiv(count, BN)
    in_group = WIDTH * tl.cdiv(m, BM)
    start = tl.program_id(0) // in_group * WIDTH
    width = tl.minimum(tiles - start, WIDTH)
    within = tl.program_id(0) % in_group
    rows = (start + within % width) * BN + tl.arange(0, BN)
    tokens = within // width * BM + tl.arange(0, BM)
    # Out of range rows and tokens read the last one, and nothing of theirs is stored.
    row = tl.minimum(rows, count - 1).to(tl.int64)
    token = tl.minimum(tokens, m - 1).to(tl.int64)
    input_ = tl.arange(0, BK)
    u_at = u_ptr + row[:, None] * k + input_[None, :]
    x_at = x_ptr + token[None, :] * k + input_[:, None]
    s_at = s_ptr + (first + row) * (k // GROUP)
    acc = tl.zeros((BN, BM), tl.float32)
    following = tl.load(s_at)
    for offset in range(0, k, BK):
        u = tl.load(u_at + offset)
        x = tl.load(x_at + offset)
        # A step ahead: what a product does not read is not pipelined.
        scale = following
        following = tl.load(s_at + tl.minimum(offset + BK, k - BK) // GROUP)
        if not ASM:
            # The interpreter multiplies the bits of operands that are not float32.
            u, x = u.to(tl.float32), x.to(tl.float32)
        acc += tl.dot(u, x, input_precision="ieee") * scale[:, None]
    store_tile(
        acc,
        y_ptr,
        first + rows,
        tokens,
        tl.program_id(1),
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
