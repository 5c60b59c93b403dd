"""Loads of queries and packed vectors of several KV heads at a time, heads as the first dimension."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.attention.kernel import e4m3_float16
from sglang_modelopt_kernels.formats.fp4_packing.kernel import e4m3_scale_float16, planes_float16


@triton.jit
def load_queries(
    at, channel, GROUP: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BG: tl.constexpr, COMPUTE: tl.constexpr
):
    """Load the GROUP query heads of each of BH KV heads at ``channel`` ``[C]``: ``[BH, C, BG]``, zero past GROUP and D."""
    group = tl.arange(0, BG)[None, None, :]
    query_head = tl.arange(0, BH)[:, None, None] * GROUP + group
    mask = (group < GROUP) & (channel < D)[None, :, None]
    return tl.load(at + query_head * D + channel[None, :, None], mask=mask, other=0.0).to(COMPUTE)


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
    BH: tl.constexpr,
    BN: tl.constexpr,
    ASM: tl.constexpr,
    OUT: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """Load four planes of the NVFP4 vectors of BH heads in ``slot`` (int64 ``[BN]``), times 2^-14: ``[BH, BN, E]``.

    With ACROSS the result is ``[BH, E, BN]``, the left operand of a product over tokens. Codes are then transposed on their way
    out of shared memory: transposing the decoded planes would move four times as many bytes through it. E is D / 4, rounded up to
    a power of two.
    """
    heads = tl.arange(0, BH)[:, None]
    element = tl.arange(0, E)[None, :]
    block = tl.arange(0, E // 4)[None, :]
    codes_at = code_ptr + (head + heads) * (D // 4) + element
    # Block scales of keys (SIDE 0) and values (1) are adjacent.
    scales_at = scale_ptr + (head + heads) * (2 * (D // 16)) + SIDE * (D // 16) + block
    code_row = slot * (H * (D // 4))
    scale_row = slot * (H * (2 * (D // 16)))
    if ACROSS:
        codes_at = codes_at[:, :, None] + code_row[None, None, :]
        scales_at = scales_at[:, :, None] + scale_row[None, None, :]
        inside, inside_scales = (element < D // 4)[:, :, None], (block < D // 16)[:, :, None]
    else:
        codes_at = codes_at[:, None, :] + code_row[None, :, None]
        scales_at = scales_at[:, None, :] + scale_row[None, :, None]
        inside, inside_scales = (element < D // 4)[:, None, :], (block < D // 16)[:, None, :]
    if 4 * E == D:
        codes = tl.load(codes_at)
        stored = tl.load(scales_at)
    else:
        codes = tl.load(codes_at, mask=inside, other=0)
        stored = tl.load(scales_at, mask=inside_scales, other=0)
    scale = e4m3_scale_float16(stored)
    if ACROSS:
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None, :], (BH, E // 4, 4, BN)), (BH, E, BN))
    else:
        scale = tl.reshape(tl.broadcast_to(scale[:, :, :, None], (BH, BN, E // 4, 4)), (BH, BN, E))
    p0, p1, p2, p3 = planes_float16(codes, scale, ASM)
    return p0.to(OUT), p1.to(OUT), p2.to(OUT), p3.to(OUT)


@triton.jit
def load_fp8(
    code_ptr,
    slot,
    head,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BH: tl.constexpr,
    NATIVE: tl.constexpr,
    OUT: tl.constexpr,
):
    """Load the FP8 vectors of BH heads in ``slot`` (int64 ``[BN]``): ``[BH, BN, DP]``, zero past D."""
    channel = tl.arange(0, DP)
    at = (code_ptr + (head + tl.arange(0, BH))[:, None] * D + channel[None, :])[:, None, :] + (slot * (H * D))[
        None, :, None
    ]
    if DP == D:
        codes = tl.load(at)
    else:
        codes = tl.load(at, mask=(channel < D)[None, None, :], other=0)
    return e4m3_float16(codes, NATIVE).to(OUT)
