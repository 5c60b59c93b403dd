"""``Y^T = W X^T`` over 8-bit codes: decoded in registers, or multiplied as they are.

The weight is the left operand, with the long side of the matrix instruction, because decoding has few tokens.

Numerics: every product is exact, and the sum is fp32. E4M3 and int8 values are exact in fp16 and bf16; E4M3 times a power of two
within :data:`.packing.SPAN` is exact in bf16. Under fp32 scales a block's partial sum is scaled. int8 x int8 and E4M3 x E4M3 have
matrix instructions of their own: sums of the former are int32, and exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.early import after_previous
from sglang_modelopt_kernels.gemm.common.kernel import (
    drain_wgmma,
    rotated,
    steps_of,
    store_tile,
    tokens_first,
)

from .decode import e4m3_bfloat16, e4m3_float16, int8_bfloat16, int8_float16


@triton.jit
def whole_sum(
    x_ptr,
    w_ptr,
    s_ptr,
    row,
    s_row,
    token,
    known,
    k,
    first,
    steps,
    begin,
    KIND: tl.constexpr,
    MATH: tl.constexpr,
    NATIVE: tl.constexpr,
    ASM: tl.constexpr,
    WGMMA: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Multiply rows ``row`` of the weight by rows ``token`` of ``x`` (int64): ``[BN, BM]``.

    K is read in ``steps`` steps of BK from step ``first`` on, that of ``begin`` first (:func:`rotated`). Tokens that are not
    ``known`` count as zeros, unless EVEN_M: then ``token`` has a row to read for each, whose result is not stored.
    Weights are bf16 or int8 by KIND, else E4M3, or its bytes where NATIVE is off; ``s_row`` are the rows of their block scales. The
    sum is fp32, or int32 for MATH ``i8``.
    """
    offs_k = tl.arange(0, BK)
    GROUP: tl.constexpr = 32 if KIND == "e4m3_exponent" else BK
    block = tl.arange(0, BK // GROUP)
    blocks = tl.cdiv(k, GROUP).to(tl.int64)
    # Triton's interpreter multiplies the raw bits of bf16 operands, and has no E4M3: give it the same values in fp32.
    BF16: tl.constexpr = tl.bfloat16 if ASM else tl.float32
    acc = tl.zeros((BN, BM), tl.int32 if MATH == "i8" else tl.float32)
    # Prefetch the next scale: Triton only pipelines loads that feed `tl.dot`.
    if KIND == "e4m3_float":
        s_row_at = s_ptr + s_row[:, None] * blocks + block[None, :]
        prefetched = tl.load(s_row_at + tl.minimum((first + begin) * BK, k - 1) // GROUP)
    for step in range(steps):
        offset = (first + rotated(step, begin, steps)) * BK
        drain_wgmma(offset, WGMMA)
        w_at = w_ptr + row[:, None] * k + (offset + offs_k)[None, :]
        x_at = x_ptr + token[None, :] * k + (offset + offs_k)[:, None]
        s_at = s_ptr + s_row[:, None] * blocks + (offset // GROUP + block)[None, :]
        if EVEN_K:
            w = tl.load(w_at)
            x = tl.load(x_at) if EVEN_M else tl.load(x_at, mask=known[None, :], other=0 if MATH == "i8" else 0.0)
        else:
            w_inside = (offset + offs_k < k)[None, :]
            x_inside = (offset + offs_k < k)[:, None] & known[None, :]
            w = tl.load(w_at, mask=w_inside, other=0 if KIND == "int8" or not NATIVE else 0.0)
            x = tl.load(x_at, mask=x_inside, other=0 if MATH == "i8" else 0.0)
        if KIND == "e4m3_float":
            sum_scale = prefetched
            following = (first + rotated(step + 1, begin, steps)) * BK
            prefetched = tl.load(s_row_at + tl.minimum(following, k - 1) // GROUP)
        if MATH == "fp8":
            if ASM:
                # On Hopper the instruction keeps about 14 bits of a sum: promote to fp32 after every step.
                acc = tl.dot(w, x, acc, max_num_imprecise_acc=BK)
            else:
                acc = tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
        elif MATH == "i8":
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        else:
            if KIND == "bf16":
                unit = w.to(BF16)
            elif KIND == "int8" and MATH == "f16":
                unit = int8_float16(w, ASM)
            elif KIND == "int8":
                unit = int8_bfloat16(w, NATIVE, ASM)
            elif MATH == "f16":
                unit = e4m3_float16(w, NATIVE, ASM)
            elif KIND == "e4m3_exponent":
                if EVEN_K:
                    b = tl.load(s_at)
                else:
                    b = tl.load(s_at, mask=(offset + GROUP * block < k)[None, :], other=0)
                b = tl.reshape(tl.broadcast_to(b[:, :, None], (BN, BK // GROUP, GROUP)), (BN, BK))
                unit = e4m3_bfloat16(w, b, True, NATIVE, ASM)
            else:
                unit = e4m3_bfloat16(w, w, False, NATIVE, ASM)
            x = x.to(tl.float16 if MATH == "f16" else BF16)
            if KIND == "e4m3_float":
                # One block for each step: scale its sum.
                acc += tl.dot(unit, x, input_precision="ieee") * sum_scale
            else:
                acc = tl.dot(unit, x, acc, input_precision="ieee")
    return acc


@triton.jit
def eight_bit_kernel(
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
    KIND: tl.constexpr,
    MATH: tl.constexpr,
    NATIVE: tl.constexpr,
    ASM: tl.constexpr,
    WGMMA: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
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
    """Compute one ``[BN, BM]`` tile of ``Y^T``, or with SPLIT_K > 1 a part of its sum; see :func:`store_tile`."""
    tile, part = tokens_first()
    rows = tile * BN + tl.arange(0, BN)
    tokens = part * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    # Rows out of range read the last one: no mask in the loop, and their results are not stored.
    row = tl.minimum(rows, n - 1).to(tl.int64)
    token = tl.minimum(tokens, m - 1).to(tl.int64)
    first, steps = steps_of(k, split, BK, SPLIT_K)
    after_previous(PDL)
    acc = whole_sum(
        x_ptr,
        w_ptr,
        s_ptr,
        row,
        row // SCALE_ROWS,
        token,
        tokens < m,
        k,
        first,
        steps,
        # Large tiles read other tokens' lines too, and have no registers to spare for a beginning of their own.
        0 if BM >= 64 else tile % tl.maximum(steps, 1),
        KIND,
        MATH,
        NATIVE,
        ASM,
        WGMMA,
        EVEN_M,
        EVEN_K,
        BN,
        BM,
        BK,
    )
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
def byte_decode_kernel(
    w_ptr,
    s_ptr,
    y_ptr,
    first,
    n,
    k,
    KIND: tl.constexpr,
    F16: tl.constexpr,
    NATIVE: tl.constexpr,
    ASM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Decode rows ``first .. first + n`` of the codes to values ``[n, K]``, times their exponents where KIND has them."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row = (first + tl.minimum(rows, n - 1)).to(tl.int64)
    offs_k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (rows < n)[:, None] & (offs_k < k)[None, :]
    w_at = w_ptr + row[:, None] * k + offs_k[None, :]
    w = tl.load(w_at, mask=inside, other=0 if KIND == "int8" or not NATIVE else 0.0)
    if KIND == "int8" and F16:
        unit = int8_float16(w, ASM)
    elif KIND == "int8":
        unit = int8_bfloat16(w, NATIVE, ASM)
    elif F16:
        unit = e4m3_float16(w, NATIVE, ASM)
    elif KIND == "e4m3_exponent":
        block = tl.program_id(1) * (BK // 32) + tl.arange(0, BK // 32)
        known = (rows < n)[:, None] & (block < k // 32)[None, :]
        b = tl.load(s_ptr + row[:, None] * (k // 32) + block[None, :], mask=known, other=0)
        b = tl.reshape(tl.broadcast_to(b[:, :, None], (BN, BK // 32, 32)), (BN, BK))
        unit = e4m3_bfloat16(w, b, True, NATIVE, ASM)
    else:
        unit = e4m3_bfloat16(w, w, False, NATIVE, ASM)
    at = y_ptr + rows.to(tl.int64)[:, None] * k + offs_k[None, :]
    tl.store(at, unit.to(y_ptr.dtype.element_ty), mask=inside)
