"""``Y^T = W X^T`` for the pairs of one block and the weight of their expert.

Sums over 4-bit weights are those of the products for one weight. Of the others, E4M3 meets E4M3 in a matrix instruction of its own,
where every product is exact; other activations meet the weight in their own type, which holds it exactly. Where Triton has no E4M3,
its bits in the place of float16's or bf16's are the number times 2^-8 or 2^-120.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.gemm.block_scaled.kernel import block_scaled_sum
from sglang_modelopt_kernels.gemm.mxfp4.kernel import mxfp4_sum
from sglang_modelopt_kernels.gemm.tile.kernel import drain_wgmma, store_tile


@triton.jit
def _e4m3_float16(w, NATIVE: tl.constexpr):
    """E4M3, or its bytes, as float16."""
    if NATIVE:
        unit = w.to(tl.float16)
    else:
        u = w.to(tl.uint16)
        unit = ((((u & 0x80) << 8) | ((u & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0).to(tl.float16)
    return unit


@triton.jit
def _e4m3_bfloat16(w, scale, NATIVE: tl.constexpr, ASM: tl.constexpr):
    """E4M3, or its bytes, times ``scale``, a float32 power of two, as bf16; as float32 in the interpreter."""
    u = w.to(tl.uint8, bitcast=True).to(tl.uint16)
    bits = ((u & 0x80) << 8) | ((u & 0x7F) << 4)
    if not ASM:
        unit = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True) * 2.0**120 * scale
    elif NATIVE:
        unit = w.to(tl.bfloat16) * scale.to(tl.bfloat16)
    else:
        unit = bits.to(tl.bfloat16, bitcast=True) * (scale * 2.0**120).to(tl.bfloat16)
    return unit


@triton.jit
def whole_sum(
    x_ptr,
    w_ptr,
    s_ptr,
    row,
    token,
    k,
    KIND: tl.constexpr,
    MATH: tl.constexpr,
    NATIVE: tl.constexpr,
    ASM: tl.constexpr,
    WGMMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows ``row`` of the weight times rows ``token`` of ``x`` (int64): float32 ``[BN, BM]``.

    A weight has whole bytes: bf16 or int8 as KIND says, else E4M3, or with NATIVE off its bytes.
    """
    input_ = tl.arange(0, BK)
    GROUP: tl.constexpr = 32 if KIND == "e4m3_exponent" else BK
    block = tl.arange(0, BK // GROUP)
    blocks = tl.cdiv(k, GROUP).to(tl.int64)
    # The interpreter multiplies the bits of bf16 operands, and has no E4M3: it gets the same numbers in float32.
    BF16: tl.constexpr = tl.bfloat16 if ASM else tl.float32
    acc = tl.zeros((BN, BM), tl.float32)
    for offset in range(0, k, BK):
        drain_wgmma(offset, WGMMA)
        w_at = w_ptr + row[:, None] * k + (offset + input_)[None, :]
        x_at = x_ptr + token[None, :] * k + (offset + input_)[:, None]
        s_at = s_ptr + row[:, None] * blocks + (offset // GROUP + block)[None, :]
        if EVEN_K:
            w = tl.load(w_at)
            x = tl.load(x_at)
        else:
            w_inside = (offset + input_ < k)[None, :]
            x_inside = (offset + input_ < k)[:, None]
            w = tl.load(w_at, mask=w_inside, other=0 if KIND == "int8" or not NATIVE else 0.0)
            x = tl.load(x_at, mask=x_inside, other=0.0)
        if MATH == "fp8":
            if ASM:
                # On Hopper the instruction keeps about 14 bits of a sum: promoted to float32 after every step.
                acc = tl.dot(w, x, acc, max_num_imprecise_acc=BK)
            else:
                acc = tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
        else:
            if KIND == "int8" or KIND == "bf16":
                unit = w.to(tl.float16 if MATH == "f16" else BF16)
            elif MATH == "f16":
                unit = _e4m3_float16(w, NATIVE)
            elif KIND == "e4m3_exponent":
                if EVEN_K:
                    b = tl.load(s_at)
                else:
                    b = tl.load(s_at, mask=(offset + GROUP * block < k)[None, :], other=0)
                scale = (b.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
                scale = tl.broadcast_to(scale[:, :, None], (BN, BK // GROUP, GROUP))
                unit = _e4m3_bfloat16(w, tl.reshape(scale, (BN, BK)), NATIVE, ASM)
            else:
                unit = _e4m3_bfloat16(w, tl.full((BN, BK), 1.0, tl.float32), NATIVE, ASM)
            x = x.to(tl.float16 if MATH == "f16" else BF16)
            if KIND == "e4m3_float":
                # One block per step: scale its sum.
                acc += tl.dot(unit, x, input_precision="ieee") * tl.load(s_at)
            else:
                acc = tl.dot(unit, x, acc, input_precision="ieee")
    return acc


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
    """One ``[BN, BM]`` tile of ``Y^T``. Blocks of pairs vary fastest, so that those of one expert share its weight in the cache."""
    block = tl.program_id(0)
    owner = tl.load(owner_ptr + block)
    if owner < 0:
        return
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    pair = tl.load(pairs_ptr + block.to(tl.int64) * BM + tl.arange(0, BM))
    # Out of range rows and pairs read the last one: no mask in the loop, and nothing of theirs is stored.
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
            k,
            0,
            k,
            KIND,
            GROUP,
            MATH == "f16",
            ASM,
            FRAGMENTS,
            False,
            WGMMA,
            EVEN_K,
            BN,
            BM,
            BK,
        )
    else:
        acc = whole_sum(x_ptr, w_ptr, s_ptr, first + row, token, k, KIND, MATH, NATIVE, ASM, WGMMA, EVEN_K, BN, BM, BK)
    store_tile(
        acc,
        y_ptr,
        rows,
        pair,
        tl.program_id(2),
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
