"""Rounding of activations to INT8: one read, one write."""

from __future__ import annotations

import triton
import triton.language as tl

OPTIONS = {"enable_fp_fusion": False}
"""Options of every launch: a fused multiply-add with the rounding's constant would not round the product with ``1 / scale`` first,
and values whose rounded product is halfway between two integers would get the wrong one."""


@triton.jit
def quantize_int8_kernel(
    x_ptr,
    smoothing_ptr,
    scale_ptr,
    y_ptr,
    row_scale_ptr,
    k,
    stride,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round one token, ``y[m, k] = round(x[m, k] * smoothing[k] * (1 / scale))``, and store its scale, NaN for a token with NaN."""
    token = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr)
    inverse = tl.div_rn(1.0, scale)
    spoiled = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, k, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < k
        x = tl.load(x_ptr + token * stride + column, mask=inside, other=0.0).to(tl.float32)
        if SMOOTH:
            x = x * tl.load(smoothing_ptr + column, mask=inside, other=0.0).to(tl.float32)
        x = x * inverse
        spoiled |= (x != x).to(tl.int32)
        # Saturate before rounding, infinity included. NaN becomes zero, and the scale of its token NaN.
        x = tl.where(x > 127.0, 127.0, tl.where(x < -128.0, -128.0, tl.where(x == x, x, 0.0)))
        # Adding and subtracting 1.5 * 2^23 rounds to integers, ties to even.
        y = (x + 12582912.0) - 12582912.0
        tl.store(y_ptr + token * k + column, y.to(tl.int8), mask=inside)
    tl.store(row_scale_ptr + token, tl.where(tl.max(spoiled) == 0, scale, float("nan")))
