"""SwiGLU of a token and the rounding of the result to E4M3, in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.early import after_previous
from sglang_modelopt_kernels.quantize.fp8.kernel import part_amax, round_token


@triton.jit
def swiglu_fp8_kernel(
    h_ptr,
    smoothing_ptr,
    static_ptr,
    gated_ptr,
    y_ptr,
    scale_ptr,
    amax_ptr,
    k,
    stride,
    SMOOTH: tl.constexpr,
    STATIC: tl.constexpr,
    WHOLE: tl.constexpr,
    CAST: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ``gated = silu(gate) * up`` of BLOCK values of one token; its ``h`` is ``k`` values of the gate and ``k`` of up.

    ``gated`` is rounded to its type, smoothed, and rounded to E4M3 from there: here with STATIC, or with WHOLE, where BLOCK holds
    the token. Else the part's amax goes to ``amax[token, part]``, and another kernel rounds.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < k
    after_previous(PDL)
    at = h_ptr + token * stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + k, mask=inside, other=0.0).to(tl.float32)
    # Where exp overflows, gate / infinity is the limit, zero.
    gated = (tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up).to(gated_ptr.dtype.element_ty)
    tl.store(gated_ptr + token * k + column, gated, mask=inside)
    values = gated.to(tl.float32)
    if SMOOTH:
        values = values * tl.load(smoothing_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if STATIC or WHOLE:
        round_token(values, static_ptr, y_ptr, scale_ptr, token, column, k, STATIC, CAST)
    else:
        tl.store(amax_ptr + token * tl.num_programs(1) + tl.program_id(1), part_amax(values))
