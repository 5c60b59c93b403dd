"""Device functions of the attention kernels: decoding of packed vectors in registers, and the Hadamard rotation."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.formats.fp4_packing.kernel import e4m3_scale_float16, planes_float16

PLANES_DESCALE = 2.0**14
"""Inverse of the factor 2^-14 that decoded planes have: code times block scale times 2^-14."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def e4m3_float16(b, NATIVE: tl.constexpr):
    """Convert E4M3 bytes to fp16, NaN included."""
    if NATIVE:
        value = b.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        bits = b.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        value = tl.where((bits & 0x7F) == 0x7F, float("nan"), half * 256.0).to(tl.float16)
    return value


@triton.jit
def load_planes(
    code_ptr,
    scale_ptr,
    slot,
    head,
    SIDE: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BN: tl.constexpr,
    ASM: tl.constexpr,
    OUT: tl.constexpr,
):
    """Load four planes ``[BN, E]`` of the NVFP4 vectors of one head in ``slot`` (int64 ``[BN]``), times 2^-14.

    E is D / 4, rounded up to a power of two.
    """
    element = tl.arange(0, E)
    block = tl.arange(0, E // 4)
    code_ptr += head * (D // 4)
    # Block scales of keys (SIDE 0) and values (1) are adjacent.
    scale_ptr += head * (2 * (D // 16)) + SIDE * (D // 16)
    codes_at = (code_ptr + element)[None, :] + (slot * (H * (D // 4)))[:, None]
    scales_at = (scale_ptr + block)[None, :] + (slot * (H * (2 * (D // 16))))[:, None]
    if 4 * E == D:
        codes = tl.load(codes_at)
        stored = tl.load(scales_at)
    else:
        codes = tl.load(codes_at, mask=(element < D // 4)[None, :], other=0)
        stored = tl.load(scales_at, mask=(block < D // 16)[None, :], other=0)
    scale = e4m3_scale_float16(stored)
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BN, E // 4, 4)), (BN, E))
    p0, p1, p2, p3 = planes_float16(codes, scale, ASM)
    return p0.to(OUT), p1.to(OUT), p2.to(OUT), p3.to(OUT)


@triton.jit
def load_fp8(code_ptr, row, D: tl.constexpr, DP: tl.constexpr, NATIVE: tl.constexpr, OUT: tl.constexpr):
    """Load the FP8 vectors in ``row`` ``[BN]``: ``[BN, DP]``, zero past D."""
    channel = tl.arange(0, DP)
    if DP == D:
        codes = tl.load(code_ptr + row[:, None] * D + channel[None, :])
    else:
        codes = tl.load(code_ptr + row[:, None] * D + channel[None, :], mask=(channel < D)[None, :], other=0)
    return e4m3_float16(codes, NATIVE).to(OUT)


@triton.jit
def plane_channel(E: tl.constexpr):
    """Return the channel of every element in plane 0; plane q is 4 q further."""
    element = tl.arange(0, E)
    return (element // 4) * 16 + element % 4


@triton.jit
def hadamard(DP: tl.constexpr, SIZE: tl.constexpr):
    """Return Hadamard matrices of SIZE along the diagonal of ``[DP, DP]``, entries 1 and -1, zero elsewhere."""
    row = tl.arange(0, DP)[:, None]
    column = tl.arange(0, DP)[None, :]
    parity = row & column & (SIZE - 1)
    parity = parity ^ (parity >> 4)
    parity = parity ^ (parity >> 2)
    parity = parity ^ (parity >> 1)
    sign = tl.where(parity & 1 == 1, -1.0, 1.0)
    return tl.where(row // SIZE == column // SIZE, sign, 0.0)


@triton.jit
def rotated(x, DP: tl.constexpr, SIZE: tl.constexpr, NATIVE: tl.constexpr):
    """Rotate ``x`` ``[T, DP]`` by the normalized Hadamard matrix, fp32.

    Entries of 1 and -1 are exact in every dtype, and so are the products.
    """
    matrix = hadamard(DP, SIZE)
    if NATIVE:
        y = tl.dot(x, matrix.to(x.dtype), input_precision="ieee")
    else:
        y = tl.dot(x.to(tl.float32), matrix, input_precision="ieee")
    return y * (1.0 / tl.sqrt(SIZE * 1.0))


@triton.jit
def sink_weight(sink_ptr, largest):
    """Return the weight of an attention sink in a softmax whose keys were all added: what its denominator grows by.

    A sink is a logit, exponent of e, of a key without a value; ``largest`` is the maximum of the other logits, exponents of two,
    minus infinity without keys. The weight is infinite, and the result zero, where it is too large for fp32 beside theirs.
    """
    sink = tl.load(sink_ptr).to(tl.float32) * LOG2E
    return tl.where(sink == -float("inf"), 0.0, tl.exp2(sink - largest))


@triton.jit
def capped(x, cap, CAP: tl.constexpr):
    """Cap logits where CAP is set: ``cap * tanh(x / cap)``."""
    if CAP:
        y = cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0)
    else:
        y = x
    return y
