"""The rounding as one PyTorch operator. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

import torch
import triton

from sglang_modelopt_kernels.formats.base import ActivationFormat
from sglang_modelopt_kernels.formats.int8 import INT8

from .kernel import OPTIONS, quantize_int8_kernel

BLOCK = 2048


def rounds(activation: ActivationFormat | None) -> bool:
    """Return whether the kernel rounds to ``activation``: INT8 without blocks, under a static scale."""
    return activation is not None and activation.number_type == INT8 and activation.row_scale == "static"


@torch.library.custom_op("modelopt_ext::quantize_int8", mutates_args=())
def _quantize_int8(
    x: torch.Tensor, smoothing: torch.Tensor | None, static_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty((m, k), dtype=torch.int8, device=x.device)
    row_scale = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    if m == 0:
        return y, row_scale
    # A pointer stands for an absent tensor; the kernel never reads through it.
    smooth = y if smoothing is None else smoothing.contiguous()
    quantize_int8_kernel[(m,)](
        x,
        smooth,
        static_scale,
        y,
        row_scale,
        k,
        x.stride(0),
        SMOOTH=smoothing is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(k)),
        **OPTIONS,
    )
    return y, row_scale


@_quantize_int8.register_fake
def _(x: torch.Tensor, smoothing: torch.Tensor | None, static_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    del smoothing, static_scale
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def quantize_int8(
    x: torch.Tensor, smoothing: torch.Tensor | None, static_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to ``values, row_scale`` with ``x * smoothing ~ values * row_scale``, by the formula of ``INT8StaticPerTensor``.

    Args:
        x: ``[M, K]`` of a float dtype; copied unless rows are contiguous.
        smoothing: ``[K]`` of a float dtype, multiplied in fp32 before rounding; None for 1.
        static_scale: float32, one value.

    Returns:
        int8 ``[M, K]`` and float32 ``[M, 1]``: the static scale, or NaN for a token that holds NaN, which int8 lacks.
        Infinity saturates.

    Raises:
        ValueError: a shape or dtype that the kernel does not read.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be [M, K] floats, got {tuple(x.shape)} {x.dtype}")
    if smoothing is not None and smoothing.shape != x.shape[1:]:
        raise ValueError(f"smoothing must be [{x.shape[1]}], got {tuple(smoothing.shape)}")
    if static_scale.numel() != 1 or static_scale.dtype != torch.float32:
        raise ValueError(f"static_scale must be one float32, got {tuple(static_scale.shape)} {static_scale.dtype}")
    values, row_scale = _quantize_int8(x, smoothing, static_scale)
    return values, row_scale
