"""Bias and activation of the first product's rows in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.early import after_previous


@triton.jit
def _function(x, FUNCTION: tl.constexpr, ALPHA: tl.constexpr):
    """Compute ``f(x)`` in fp32. Where exp overflows, the quotient is the limit, zero."""
    if FUNCTION == "silu":
        y = tl.div_rn(x, 1.0 + tl.exp(-x * ALPHA))
    elif FUNCTION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        y = tl.div_rn(x, 1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif FUNCTION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        positive = tl.maximum(x, 0.0)
        y = positive * positive
    return y


@triton.jit
def activation_kernel(
    h_ptr,
    bias_ptr,
    expert_ptr,
    y_ptr,
    inner,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    LIMITS_FUNCTION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute BLOCK values of one row in fp32; with a gate, it is the first half of a row of ``h``, and up the second."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    after_previous(PDL)
    width = inner
    if GATED:
        width = 2 * inner
    x = tl.load(h_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    # Rows of the invalid expert have no bias.
    biased = inside
    bias_at = bias_ptr
    if HAS_BIAS:
        expert = tl.load(expert_ptr + row)
        biased = inside & (expert >= 0)
        bias_at = bias_ptr + expert.to(tl.int64) * width + column
        x += tl.load(bias_at, mask=biased, other=0.0).to(tl.float32)
    if HAS_LIMIT and not LIMITS_FUNCTION:
        x = tl.minimum(x, LIMIT)
    y = _function(x, FUNCTION, ALPHA)
    if GATED:
        up = tl.load(h_ptr + row * width + inner + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            up += tl.load(bias_at + inner, mask=biased, other=0.0).to(tl.float32)
        if HAS_LIMIT:
            if LIMITS_FUNCTION:
                y = tl.minimum(y, LIMIT)
            up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        if OFFSET != 0.0:
            up += OFFSET
        y *= up
    tl.store(y_ptr + row * inner + column, y.to(y_ptr.dtype.element_ty), mask=inside)
