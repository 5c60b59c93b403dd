"""``Y^T = W X^T`` for the pairs of one block and the weight of their expert.

The sums are those of the products with one weight. E4M3 x E4M3 has a matrix instruction of its own, where every product is exact;
other activations are multiplied in their own dtype, which holds the weight exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.gemm.common.kernel import store_tile
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell.kernel import mxfp4_sum
from sglang_modelopt_kernels.gemm.w4_decode.kernel import block_scaled_sum
from sglang_modelopt_kernels.gemm.w8_decode.kernel import whole_sum


@triton.jit
def grouped_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    pairs_ptr,
    owner_ptr,
    row_scale_ptr,
    out_scale_ptr,
    y_ptr,
    pairs,
    experts,
    n,
    k,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    MATH: tl.constexpr,
    NATIVE: tl.constexpr,
    ASM: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    WGMMA: tl.constexpr,
    DESCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    SHARE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute one ``[BN, BM]`` tile of ``Y^T``.

    Blocks of pairs are the fastest grid axis: those of one expert share its weight in L2.
    """
    block = tl.program_id(0)
    owner = tl.load(owner_ptr + block)
    if owner < 0:
        return
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    pair = tl.load(pairs_ptr + block.to(tl.int64) * BM + tl.arange(0, BM))
    # Rows out of range read the last one: no mask in the loop, and their results are not stored.
    row = tl.minimum(rows, n - 1).to(tl.int64)
    last = tl.minimum(pair, pairs - 1).to(tl.int64)
    if owner == experts:
        nothing = tl.zeros((BN, BM), y_ptr.dtype.element_ty)
        y_at = y_ptr + last[None, :] * n + rows.to(tl.int64)[:, None]
        tl.store(y_at, nothing, mask=(rows < n)[:, None] & (pair < pairs)[None, :])
        return
    first = owner.to(tl.int64) * n
    token = last // SHARE
    if KIND == "mxfp4":
        acc = mxfp4_sum(x_ptr, w_ptr, s_ptr, first + row, token, k, 0, k, EVEN_K, BN, BM, BK)
    elif KIND == "e2m1_e4m3" or KIND == "e2m1_exponent" or KIND == "int4_float":
        acc = block_scaled_sum(
            x_ptr,
            w_ptr,
            s_ptr,
            first + row,
            token,
            pair < pairs,
            k,
            0,
            tl.cdiv(k, BK),
            (block + tl.program_id(1)) % tl.cdiv(k, BK),
            KIND,
            GROUP,
            MATH == "f16",
            ASM,
            FRAGMENTS,
            False,
            WGMMA,
            BM >= 64,
            EVEN_K,
            BN,
            BM,
            BK,
        )
    else:
        row = first + row
        steps = tl.cdiv(k, BK)
        begin = (block + tl.program_id(1)) % steps
        acc = whole_sum(
            x_ptr, w_ptr, s_ptr, row, row, token, pair < pairs, k, 0, steps, begin,
            KIND, MATH, NATIVE, ASM, WGMMA, BM >= 64, EVEN_K, BN, BM, BK,
        )  # fmt: skip
    store_tile(
        acc,
        y_ptr,
        y_ptr,
        owner_ptr,
        rows,
        pair,
        0,
        0,
        pairs,
        n,
        row_scale_ptr,
        out_scale_ptr + first,
        out_scale_ptr,
        1,
        DESCALE,
        HAS_ROW_SCALE,
        False,
        1,
    )
