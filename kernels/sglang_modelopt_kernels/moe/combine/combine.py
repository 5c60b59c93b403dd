"""The sum as one PyTorch operator. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

import torch
import triton

from sglang_modelopt_kernels.early import early

from .kernel import combine_kernel

BLOCK = 1024


@torch.library.custom_op("modelopt_ext::combine_experts", mutates_args=())
def _combine(y: torch.Tensor, top_k: int, weights: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    tokens, n = y.shape[0] // top_k, y.shape[1]
    out = torch.empty((tokens, n), dtype=out_dtype, device=y.device)
    if out.numel():
        block = min(BLOCK, triton.next_power_of_2(n))
        combine_kernel[(tokens, triton.cdiv(n, block))](
            y.contiguous(),
            # A pointer stands for an absent tensor; the kernel never reads through it.
            y if weights is None else weights.contiguous(),
            out,
            n,
            HAS_WEIGHTS=weights is not None,
            TOP_K=top_k,
            BLOCK=block,
            **early(y.device),
        )
    return out


@_combine.register_fake
def _(y: torch.Tensor, top_k: int, weights: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    del weights
    return y.new_empty((y.shape[0] // top_k, y.shape[1]), dtype=out_dtype)


def combine(y: torch.Tensor, top_k: int, weights: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute ``out[t] = sum_j weights[t, j] * y[t * top_k + j]`` in fp32 in the order of ``j``, rounded once.

    Args:
        y: outputs of the pairs, ``[T * top_k, N]`` of a float dtype; zero for a pair that no expert of this rank has.
        top_k: pairs of a token.
        weights: ``[T, top_k]`` of a float dtype, None for ones.
        out_dtype: type of the result.

    Returns:
        ``[T, N]`` of ``out_dtype``.

    Raises:
        ValueError: a shape or type that the kernel does not read.
    """
    if y.dim() != 2 or not y.is_floating_point() or y.shape[0] % top_k:
        raise ValueError(f"y must be [T * {top_k}, N] floats, got {tuple(y.shape)} {y.dtype}")
    if weights is not None and (weights.shape != (y.shape[0] // top_k, top_k) or not weights.is_floating_point()):
        raise ValueError(f"weights must be [{y.shape[0] // top_k}, {top_k}] floats, got {tuple(weights.shape)}")
    out: torch.Tensor = _combine(y, top_k, weights, out_dtype)
    return out
