"""RMSNorm of a token after the addition of its residual, and the rounding of the result to E4M3, in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.early import after_previous
from sglang_modelopt_kernels.quantize.fp8.kernel import round_token


@triton.jit
def rms_norm_fp8_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    smoothing_ptr,
    static_ptr,
    normed_ptr,
    y_ptr,
    scale_ptr,
    k,
    stride,
    residual_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    SMOOTH: tl.constexpr,
    STATIC: tl.constexpr,
    CAST: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalize one token of ``k`` values, at most BLOCK: ``normed = (x + residual) * rsqrt(mean square + eps) * weight``.

    The sum replaces ``residual``; ``normed`` is rounded to its type, smoothed, and rounded to E4M3 from there.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < k
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    after_previous(PDL)
    x = tl.load(x_ptr + token * stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_at = residual_ptr + token * residual_stride + column
        x += tl.load(residual_at, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual_at, x.to(residual_ptr.dtype.element_ty), mask=inside)
    normed = (x * tl.rsqrt(tl.sum(x * x) / k + eps) * weight).to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + token * k + column, normed, mask=inside)
    values = normed.to(tl.float32)
    if SMOOTH:
        values = values * tl.load(smoothing_ptr + column, mask=inside, other=0.0).to(tl.float32)
    round_token(values, static_ptr, y_ptr, scale_ptr, token, column, k, STATIC, CAST)
