"""A permutation and a cast of activations."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.early import after_previous


@triton.jit
def order_kernel(x_ptr, y_ptr, k, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """Permute each 64 of a token's ``k`` values: value ``16 a + 4 p + b`` becomes entry ``16 p + 4 a + b``."""
    token = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = entry // 64 * 64 + entry % 16 // 4 * 16 + entry % 64 // 16 * 4 + entry % 4
    value = tl.max_contiguous(tl.multiple_of(value, 4), 4)
    after_previous(PDL)
    x = tl.load(x_ptr + token * k + value, mask=entry < k)
    tl.store(y_ptr + token * k + entry, x.to(y_ptr.dtype.element_ty), mask=entry < k)
