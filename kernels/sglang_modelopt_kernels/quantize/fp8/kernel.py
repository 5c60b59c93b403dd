"""Rounding of activations to E4M3: one read and one write, and a second, cached read where a token's amax is computed first."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.quantize.kernel import round_to_e4m3


@triton.jit
def _load(x_ptr, smoothing_ptr, at, column, k, SMOOTH: tl.constexpr):
    """Load smoothed activations in fp32, zero past K."""
    x = tl.load(x_ptr + at, mask=column < k, other=0.0).to(tl.float32)
    if SMOOTH:
        x = x * tl.load(smoothing_ptr + column, mask=column < k, other=0.0).to(tl.float32)
    return x


@triton.jit
def quantize_static_kernel(
    x_ptr, smoothing_ptr, scale_ptr, y_ptr, k, stride, SMOOTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Round BLOCK values of one token: ``y[m, k] = e4m3(x[m, k] * smoothing[k] * (1 / scale))``."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inverse = tl.div_rn(1.0, tl.load(scale_ptr))
    x = _load(x_ptr, smoothing_ptr, token * stride + column, column, k, SMOOTH)
    y = round_to_e4m3(x * inverse)
    tl.store(y_ptr + token * k + column, y.to(y_ptr.dtype.element_ty), mask=column < k)


@triton.jit
def quantize_token_kernel(
    x_ptr,
    smoothing_ptr,
    amax_ptr,
    y_ptr,
    scale_ptr,
    k,
    stride,
    SMOOTH: tl.constexpr,
    HAS_AMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round one token under its own scale, amax / 448, and store the scale; with HAS_AMAX the amax is given (that of all ranks)."""
    token = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    spoiled = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, k, BLOCK):
        column = start + tl.arange(0, BLOCK)
        magnitude = tl.abs(_load(x_ptr, smoothing_ptr, token * stride + column, column, k, SMOOTH))
        # A maximum may lose a NaN. Neither NaN nor infinity is at most the largest finite fp32.
        spoiled |= tl.where(magnitude <= 3.4028234663852886e38, 0, 1)
        largest = tl.maximum(largest, magnitude)
    amax = tl.max(largest)
    if HAS_AMAX:
        amax = tl.load(amax_ptr + token)
    scale = tl.maximum(tl.div_rn(amax, 448.0), 1.1754943508222875e-38)
    scale = tl.where(amax == 0.0, 1.0, scale)
    is_finite = (tl.max(spoiled) == 0) & (amax <= 3.4028234663852886e38)
    scale = tl.where(is_finite, scale, float("nan"))
    inverse = tl.div_rn(1.0, scale)
    tl.store(scale_ptr + token, scale)
    for start in range(0, k, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = _load(x_ptr, smoothing_ptr, token * stride + column, column, k, SMOOTH)
        y = round_to_e4m3(x * inverse)
        tl.store(y_ptr + token * k + column, y.to(y_ptr.dtype.element_ty), mask=column < k)
