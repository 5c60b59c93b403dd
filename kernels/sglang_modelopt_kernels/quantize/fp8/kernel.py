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
def _to_e4m3(x, dtype: tl.constexpr, CAST: tl.constexpr):
    """Round fp32 to E4M3 values in ``dtype``: with CAST by the GPU's own instruction, of SM89 and later, which gives the same."""
    return x.to(tl.float8e4nv).to(dtype) if CAST else round_to_e4m3(x).to(dtype)


@triton.jit
def round_token(x, static_ptr, y_ptr, scale_ptr, token, column, k, STATIC: tl.constexpr, CAST: tl.constexpr):
    """Round a token's values ``x`` in fp32, zero past K, and write them to ``y[token, :k]``.

    With STATIC ``x`` may be a part of the token, rounded under the scale at ``static``; else the token's own scale is written to
    ``scale[token]``.
    """
    if STATIC:
        scale = tl.load(static_ptr)
    else:
        magnitude = tl.abs(x)
        scale = _token_scale(tl.max(magnitude), tl.max(_is_spoiled(magnitude)))
        tl.store(scale_ptr + token, scale)
    y = _to_e4m3(x * tl.div_rn(1.0, scale), y_ptr.dtype.element_ty, CAST)
    tl.store(y_ptr + token * k + column, y, mask=column < k)


@triton.jit
def part_amax(x):
    """Return the amax of a part of a token, for :func:`quantize_given_kernel`: infinity where a value is NaN or infinite."""
    magnitude = tl.abs(x)
    return tl.where(tl.max(_is_spoiled(magnitude)) != 0, float("inf"), tl.max(magnitude))


@triton.jit
def quantize_static_kernel(
    x_ptr,
    smoothing_ptr,
    scale_ptr,
    y_ptr,
    k,
    stride,
    SMOOTH: tl.constexpr,
    CAST: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round BLOCK values of one token: ``y[m, k] = e4m3(x[m, k] * smoothing[k] * (1 / scale))``."""
    after_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inverse = tl.div_rn(1.0, tl.load(scale_ptr))
    x = _load(x_ptr, smoothing_ptr, token * stride + column, column, k, SMOOTH)
    y = _to_e4m3(x * inverse, y_ptr.dtype.element_ty, CAST)
    tl.store(y_ptr + token * k + column, y, mask=column < k)


@triton.jit
def quantize_given_kernel(
    x_ptr,
    smoothing_ptr,
    amax_ptr,
    y_ptr,
    scale_ptr,
    k,
    stride,
    parts,
    SMOOTH: tl.constexpr,
    CAST: tl.constexpr,
    PDL: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round BLOCK values of one token under the scale of its amax, the largest of ``amax[token, :parts]``, at most PARTS."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)
    after_previous(PDL)
    amax = tl.load(amax_ptr + token * parts + part, mask=part < parts, other=0.0)
    scale = _token_scale(tl.max(amax), tl.max(_is_spoiled(amax)))
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + token, scale)
    x = _load(x_ptr, smoothing_ptr, token * stride + column, column, k, SMOOTH)
    y = _to_e4m3(x * tl.div_rn(1.0, scale), y_ptr.dtype.element_ty, CAST)
    tl.store(y_ptr + token * k + column, y, mask=column < k)


@triton.jit
def quantize_token_kernel(
    x_ptr,
    smoothing_ptr,
    y_ptr,
    scale_ptr,
    k,
    stride,
    SMOOTH: tl.constexpr,
    CAST: tl.constexpr,
    WHOLE: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round one token under its own scale, amax / 448, and store the scale.

    With WHOLE the token fits in BLOCK and stays in registers.
    """
    after_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    if WHOLE:
        column = tl.arange(0, BLOCK)
        x = _load(x_ptr, smoothing_ptr, token * stride + column, column, k, SMOOTH)
        round_token(x, scale_ptr, y_ptr, scale_ptr, token, column, k, False, CAST)
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        spoiled = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, k, BLOCK):
            column = start + tl.arange(0, BLOCK)
            magnitude = tl.abs(_load(x_ptr, smoothing_ptr, token * stride + column, column, k, SMOOTH))
            spoiled |= _is_spoiled(magnitude)
            largest = tl.maximum(largest, magnitude)
        scale = _token_scale(tl.max(largest), tl.max(spoiled))
        inverse = tl.div_rn(1.0, scale)
        tl.store(scale_ptr + token, scale)
        for start in range(0, k, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = _load(x_ptr, smoothing_ptr, token * stride + column, column, k, SMOOTH)
            y = _to_e4m3(x * inverse, y_ptr.dtype.element_ty, CAST)
            tl.store(y_ptr + token * k + column, y, mask=column < k)
