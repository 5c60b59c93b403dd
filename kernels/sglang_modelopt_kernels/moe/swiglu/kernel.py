"""Gated activation ``silu(gate) * up`` in one pass."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swiglu_kernel(h_ptr, y_ptr, inner, BLOCK: tl.constexpr):
    """Compute BLOCK values of one row in fp32; the first half of a row of ``h`` is the gate, the second up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(h_ptr + row * 2 * inner + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + row * 2 * inner + inner + column, mask=inside, other=0.0).to(tl.float32)
    # Where exp overflows, gate / infinity is the limit, zero.
    y = tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * inner + column, y.to(y_ptr.dtype.element_ty), mask=inside)
