"""The launch. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

import torch
import triton

from sglang_modelopt_kernels.early import early
from sglang_modelopt_kernels.gemm.common.launch import machine

from .kernel import order_kernel

BLOCK = 1024


def order(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Permute each 64 K elements of ``x`` ``[M, K]`` into the order of planes, cast to ``dtype``.

    Args:
        x: E4M3, float16 or bf16.
        dtype: float16 or bf16, one that holds the values of ``x``.

    Raises:
        ValueError: K is no multiple of 64.
    """
    if x.dim() != 2 or x.shape[1] % 64:
        raise ValueError(f"x must be [M, K] with K a multiple of 64, got {tuple(x.shape)}")
    x = x.contiguous()
    if x.dtype == torch.float8_e4m3fn and machine(x.device)[0] < 89:
        x = x.to(dtype)  # exact; Triton has no E4M3 before SM89
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        grid = (x.shape[0], triton.cdiv(x.shape[1], BLOCK))
        order_kernel[grid](x, y, x.shape[1], BLOCK=BLOCK, **early(x.device))
    return y
