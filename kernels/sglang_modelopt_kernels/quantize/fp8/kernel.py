"""Rounding of activations to E4M3: one read and one write; a second, cached read of tokens that do not fit in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.early import after_previous
from sglang_modelopt_kernels.quantize.kernel import round_to_e4m3


@triton.jit
def _load(x_ptr, smoothing_ptr, at, column, k, SMOOTH: tl.constexpr):
    """Load smoothed activations in fp32, zero past K."""
    x = tl.load(x_ptr + at, mask=column < k, other=0.0).to(tl.float32)
    if SMOOTH:
        x = x * tl.load(smoothing_ptr + column, mask=column < k, other=0.0).to(tl.float32)
    return x


@triton.jit
def _is_spoiled(magnitude):
    """Return 1 for NaN and infinity, else 0: a maximum may lose a NaN, and neither is at most the largest finite fp32."""
    return tl.where(magnitude <= 3.4028234663852886e38, 0, 1)


@triton.jit
def _token_scale(amax, spoiled):
    """Return the E4M3 scale of a token: amax / 448, 1 for zeros, NaN where ``spoiled`` is not 0."""
    scale = tl.maximum(tl.div_rn(amax, 448.0), 1.1754943508222875e-38)
    scale = tl.where(amax == 0.0, 1.0, scale)
    is_finite = (spoiled == 0) & (amax <= 3.4028234663852886e38)
    return tl.where(is_finite, scale, float("nan"))


@triton.jit
def round_token(x, given_ptr, y_ptr, scale_ptr, token, column, k, HAS_AMAX: tl.constexpr, STATIC: tl.constexpr):
    """Round a token's values ``x`` in fp32, zero past K, and write them to ``y[token, :k]``.

    With STATIC under the scale at ``given``, else under the token's own, which is written to ``scale[token]``: of its amax, or with
    HAS_AMAX of that at ``given[token]``.
    """
    if STATIC:
        scale = tl.load(given_ptr)
    else:
        magnitude = tl.abs(x)
        amax = tl.load(given_ptr + token) if HAS_AMAX else tl.max(magnitude)
        scale = _token_scale(amax, tl.max(_is_spoiled(magnitude)))
        tl.store(scale_ptr + token, scale)
    y = round_to_e4m3(x * tl.div_rn(1.0, scale))
    tl.store(y_ptr + token * k + column, y.to(y_ptr.dtype.element_ty), mask=column < k)


@triton.jit
def quantize_static_kernel(
    x_ptr, smoothing_ptr, scale_ptr, y_ptr, k, stride, SMOOTH: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr
):
    """Round BLOCK values of one token: ``y[m, k] = e4m3(x[m, k] * smoothing[k] * (1 / scale))``."""
    after_previous(PDL)
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
    WHOLE: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round one token under its own scale, amax / 448, and store the scale; with HAS_AMAX the amax is given (that of all ranks).

    With WHOLE the token fits in BLOCK and stays in registers.
    """
    after_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    if WHOLE:
        column = tl.arange(0, BLOCK)
        x = _load(x_ptr, smoothing_ptr, token * stride + column, column, k, SMOOTH)
        round_token(x, amax_ptr, y_ptr, scale_ptr, token, column, k, HAS_AMAX, False)
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        spoiled = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, k, BLOCK):
            column = start + tl.arange(0, BLOCK)
            magnitude = tl.abs(_load(x_ptr, smoothing_ptr, token * stride + column, column, k, SMOOTH))
            spoiled |= _is_spoiled(magnitude)
            largest = tl.maximum(largest, magnitude)
        amax = tl.load(amax_ptr + token) if HAS_AMAX else tl.max(largest)
        scale = _token_scale(amax, tl.max(spoiled))
        inverse = tl.div_rn(1.0, scale)
        tl.store(scale_ptr + token, scale)
        for start in range(0, k, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = _load(x_ptr, smoothing_ptr, token * stride + column, column, k, SMOOTH)
            y = round_to_e4m3(x * inverse)
            tl.store(y_ptr + token * k + column, y.to(y_ptr.dtype.element_ty), mask=column < k)
