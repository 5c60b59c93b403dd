"""The activation as one PyTorch operator. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

import torch
import triton

from .kernel import swiglu_kernel

BLOCK = 1024


@torch.library.custom_op("modelopt_ext::swiglu", mutates_args=())
def _swiglu(h: torch.Tensor) -> torch.Tensor:
    rows, inner = h.shape[0], h.shape[1] // 2
    y = torch.empty((rows, inner), dtype=h.dtype, device=h.device)
    if y.numel():
        block = min(BLOCK, triton.next_power_of_2(inner))
        swiglu_kernel[(rows, triton.cdiv(inner, block))](h.contiguous(), y, inner, BLOCK=block)
    return y


@_swiglu.register_fake
def _(h: torch.Tensor) -> torch.Tensor:
    return h.new_empty((h.shape[0], h.shape[1] // 2))


def swiglu(h: torch.Tensor) -> torch.Tensor:
    """Compute ``silu(gate) * up`` for ``h = [gate, up]`` ``[R, 2 * I]``: ``[R, I]`` of its dtype, in fp32, rounded once.

    Raises:
        ValueError: ``h`` is not such a matrix.
    """
    if h.dim() != 2 or h.shape[1] % 2 or h.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"h must be [R, 2 * I] in fp32, fp16 or bf16, got {tuple(h.shape)} {h.dtype}")
    y: torch.Tensor = _swiglu(h)
    return y
