"""Weighted sum over the experts of a token."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.early import after_previous


@triton.jit
def combine_kernel(
    y_ptr,
    weight_ptr,
    out_ptr,
    n,
    HAS_WEIGHTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum BLOCK values of one token's output in fp32, in the order of its choices."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    after_previous(PDL)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        y = tl.load(y_ptr + pair * n + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            y = y * tl.load(weight_ptr + pair).to(tl.float32)
        total += y
    tl.store(out_ptr + token * n + column, total.to(out_ptr.dtype.element_ty), mask=inside)
