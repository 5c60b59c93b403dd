"""The sum as one PyTorch operator. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

import torch
import triton

from .kernel import combine_kernel

BLOCK = 1024


@torch.library.custom_op("modelopt_ext::combine_experts", mutates_args=())
def _combine(y: torch.Tensor, weights: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    (tokens, top_k), n = weights.shape, y.shape[1]
    out = torch.empty((tokens, n), dtype=out_dtype, device=y.device)
    if out.numel():
        block = min(BLOCK, triton.next_power_of_2(n))
        grid = (tokens, triton.cdiv(n, block))
        combine_kernel[grid](y.contiguous(), weights.contiguous(), out, n, TOP_K=top_k, BLOCK=block)
    return out


@_combine.register_fake
def _(y: torch.Tensor, weights: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return y.new_empty((weights.shape[0], y.shape[1]), dtype=out_dtype)


def combine(y: torch.Tensor, weights: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """``out[t] = sum_j weights[t, j] * y[t * top_k + j]``, in float32 in the order of ``j``, rounded once.

    Args:
        y: outputs of the pairs, ``[T * top_k, N]`` of a float type; zero where no expert of this rank serves the pair.
        weights: ``[T, top_k]`` of a float type.
        out_dtype: type of the result.

    Returns:
        ``[T, N]`` of ``out_dtype``.

    Raises:
        ValueError: a shape or type that the kernel does not read.
    """
    if weights.dim() != 2 or not weights.is_floating_point() or not y.is_floating_point() or y.dim() != 2:
        raise ValueError(
            f"y and weights must be float matrices, got {y.shape} {y.dtype}, {weights.shape} {weights.dtype}"
        )
    if y.shape[0] != weights.numel():
        raise ValueError(f"y must have a row for each of {weights.numel()} weights, got {y.shape[0]}")
    out: torch.Tensor = _combine(y, weights, out_dtype)
    return out
