"""``Y^T = W X^T`` in block-scaled matrix instructions: E2M1 codes, E4M3 activations and UE8M0 block scales ``[N, K / 32]``.

The weight is the operand of 128 rows, because decoding has few tokens. Activations get a tensor of unit block scales: without it
Triton decomposes the product into fp16. On SM100 and SM103 the instruction reads the codes as stored: here for experts, whose
scales are not swizzled, in :mod:`..blackwell_common` for one weight. For SM120 Triton has no instruction that mixes E2M1 with
E4M3, and the codes are converted to E4M3 in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.gemm.common.kernel import store_tile


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
    """Multiply rows ``row`` of the weight by rows ``token`` of ``x`` (int64) over K ``start .. end``: ``[BN, BM]``."""
    pair = tl.arange(0, BK // 2)
    block = tl.arange(0, BK // 32)
    offs_k = tl.arange(0, BK)
    unit = tl.full((BM, BK // 32), 127, tl.uint8)  # 2^0
    acc = tl.zeros((BN, BM), tl.float32)
    for offset in range(start, end, BK):
        w_at = w_ptr + row[:, None] * (k // 2) + (offset // 2 + pair)[None, :]
        s_at = s_ptr + row[:, None] * (k // 32) + (offset // 32 + block)[None, :]
        x_at = x_ptr + token[None, :] * k + (offset + offs_k)[:, None]
        if EVEN_K:
            w = tl.load(w_at)
            s = tl.load(s_at)
            x = tl.load(x_at)
        else:
            w = tl.load(w_at, mask=(offset + 2 * pair < k)[None, :], other=0)
            s = tl.load(s_at, mask=(offset + 32 * block < k)[None, :], other=127)
            x = tl.load(x_at, mask=(offset + offs_k < k)[:, None], other=0.0)
        acc = tl.dot_scaled(w, s, "e2m1", x, unit, "e4m3", acc)
    return acc


@triton.jit
def widen(codes, ASM: tl.constexpr):
    """Convert bytes of two E2M1 codes to the E4M3 values of the low and of the high one, times 2^-6, exactly.

    E2M1's exponent and mantissa in the middle of E4M3's place are the value times 2^-6; half of it is then subnormal.
    """
    if ASM:
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 a, b;
            shl.b32 a, $2, 2;
            and.b32 a, a, 0x1c1c1c1c;
            shl.b32 b, $2, 4;
            lop3.b32 $0, b, 0x80808080, a, 0xea;
            shr.u32 a, $2, 2;
            and.b32 a, a, 0x1c1c1c1c;
            lop3.b32 $1, $2, 0x80808080, a, 0xea; }""",
            "=&r,=r,r",
            args=[codes],
            dtype=(tl.uint8, tl.uint8),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((codes & 7) << 2) | ((codes & 8) << 4)
        high = ((codes >> 2) & 0x1C) | (codes & 0x80)
    return low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)


@triton.jit
def mxfp4_widened_kernel(
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

    Codes are paired (:func:`pair_blocks`): there is one product for the low and one for the high codes of the bytes.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    row = tl.minimum(rows, n - 1).to(tl.int64)
    token = tl.minimum(tokens, m - 1).to(tl.int64)
    byte = tl.arange(0, BK // 2)
    pair = tl.arange(0, BK // 64)
    offs_k = (byte // 32) * 64 + byte % 32
    unit = tl.full((BM, BK // 64), 127, tl.uint8)  # 2^0

    steps = tl.cdiv(tl.cdiv(k, BK), SPLIT_K)
    start = split * steps * BK
    end = tl.minimum(start + steps * BK, k)
    acc = tl.zeros((BN, BM), tl.float32)
    for offset in range(start, end, BK):
        w_at = w_ptr + row[:, None] * (k // 2) + (offset // 2 + byte)[None, :]
        s_at = s_ptr + row[:, None] * (k // 32) + (offset // 32 + 2 * pair)[None, :]
        x_at = x_ptr + token[None, :] * k + (offset + offs_k)[:, None]
        if EVEN_K:
            w = tl.load(w_at)
            s_low = tl.load(s_at)
            s_high = tl.load(s_at + 1)
            x_low = tl.load(x_at)
            x_high = tl.load(x_at + 32)
        else:
            # K is a multiple of two blocks.
            inside = (offset + 64 * pair < k)[None, :]
            w = tl.load(w_at, mask=(offset + 2 * byte < k)[None, :], other=0)
            s_low = tl.load(s_at, mask=inside, other=127)
            s_high = tl.load(s_at + 1, mask=inside, other=127)
            x_low = tl.load(x_at, mask=(offset + offs_k < k)[:, None], other=0.0)
            x_high = tl.load(x_at + 32, mask=(offset + offs_k < k)[:, None], other=0.0)
        w_low, w_high = widen(w, ASM)
        acc = tl.dot_scaled(w_low, s_low, "e4m3", x_low, unit, "e4m3", acc)
        acc = tl.dot_scaled(w_high, s_high, "e4m3", x_high, unit, "e4m3", acc)
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
