"""The rounding as one PyTorch operator. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

from sglang_modelopt_kernels.early import early
from sglang_modelopt_kernels.formats.base import ActivationFormat
from sglang_modelopt_kernels.formats.fp8 import FP8

from .kernel import quantize_given_kernel, quantize_static_kernel, quantize_token_kernel

BLOCK = 2048
WHOLE = 16384
"""K up to which a token stays in registers between its maximum and its rounding."""
OUT_DTYPES = (torch.float8_e4m3fn, torch.float16)


def rounds(activation: ActivationFormat | None) -> bool:
    """Return whether the kernel rounds to ``activation``: E4M3 without blocks, under a static scale or one for each token."""
    return activation is not None and activation.number_type == FP8 and activation.row_scale is not None


@torch.library.custom_op("modelopt_ext::quantize_fp8", mutates_args=())
def _quantize_fp8(
    x: torch.Tensor,
    smoothing: torch.Tensor | None,
    static_scale: torch.Tensor | None,
    token_amax: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty((m, k), dtype=out_dtype, device=x.device)
    row_scale = torch.empty((0 if static_scale is not None else m, 1), dtype=torch.float32, device=x.device)
    if m == 0:
        return y, row_scale
    # A pointer stands for an absent tensor; the kernels never read through it.
    smooth = y if smoothing is None else smoothing.contiguous()
    shared = {"SMOOTH": smoothing is not None, "CAST": casts(x.device)} | early(x.device)
    if static_scale is not None:
        block = min(BLOCK, triton.next_power_of_2(k))
        grid = (m, triton.cdiv(k, block))
        quantize_static_kernel[grid](x, smooth, static_scale, y, k, x.stride(0), BLOCK=block, **shared)
    elif token_amax is not None:
        quantize_given(x, smoothing, token_amax.contiguous(), y, row_scale)
    else:
        quantize_token_kernel[(m,)](x, smooth, y, row_scale, k, x.stride(0), **shared | token_block(k))
    return y, row_scale


def quantize_given(
    x: torch.Tensor, smoothing: torch.Tensor | None, amax: torch.Tensor, y: torch.Tensor, row_scale: torch.Tensor
) -> None:
    """Round ``x`` ``[M, K]`` into ``y`` under the scales of ``amax``, float32 ``[M, parts]``, and write these to ``row_scale``."""
    m, k = x.shape
    block = min(BLOCK, triton.next_power_of_2(k))
    quantize_given_kernel[(m, triton.cdiv(k, block))](
        x,
        y if smoothing is None else smoothing.contiguous(),
        amax,
        y,
        row_scale,
        k,
        x.stride(0),
        amax.shape[1],
        SMOOTH=smoothing is not None,
        CAST=casts(x.device),
        PARTS=triton.next_power_of_2(amax.shape[1]),
        BLOCK=block,
        **early(x.device),
    )


@functools.cache
def casts(device: torch.device) -> bool:
    """Return whether ``device`` has an instruction that rounds to E4M3; Triton's interpreter has none that rounds to nearest."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def check_given(
    x: torch.Tensor, smoothing: torch.Tensor | None, static_scale: torch.Tensor | None, out_dtype: torch.dtype
) -> None:
    """Raise ValueError unless tokens ``x`` ``[M, K]`` can be rounded to ``out_dtype`` with what is given."""
    if smoothing is not None and smoothing.shape != x.shape[1:]:
        raise ValueError(f"smoothing must be [{x.shape[1]}], got {tuple(smoothing.shape)}")
    if static_scale is not None and (static_scale.numel() != 1 or static_scale.dtype != torch.float32):
        raise ValueError(f"static_scale must be one float32, got {tuple(static_scale.shape)} {static_scale.dtype}")
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype must be E4M3 or float16, got {out_dtype}")


def token_block(k: int) -> dict[str, Any]:
    """Return the block and the warps of a program that computes a token of ``k`` values."""
    block = triton.next_power_of_2(k)
    if block > WHOLE:
        return {"BLOCK": BLOCK, "WHOLE": False, "num_warps": 4}
    return {"BLOCK": block, "WHOLE": True, "num_warps": min(max(block // 512, 1), 16)}


@_quantize_fp8.register_fake
def _(
    x: torch.Tensor,
    smoothing: torch.Tensor | None,
    static_scale: torch.Tensor | None,
    token_amax: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    del smoothing, token_amax
    rows = 0 if static_scale is not None else x.shape[0]
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty((rows, 1), dtype=torch.float32)


def quantize_fp8(
    x: torch.Tensor,
    smoothing: torch.Tensor | None = None,
    static_scale: torch.Tensor | None = None,
    token_amax: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to ``values, row_scale`` with ``x * smoothing ~ values * row_scale`` and E4M3 ``values``.

    The formulas are those of ``FP8StaticPerTensor`` and ``FP8DynamicPerToken`` in ``formats/fp8.py``.

    Args:
        x: ``[M, K]`` of a float dtype; copied unless rows are contiguous.
        smoothing: ``[K]`` of a float dtype, multiplied in fp32 before rounding; None for 1.
        static_scale: float32, one value, for the static format; None for a scale for each token.
        token_amax: float32 ``[M, 1]`` for the dynamic format, where a rank has only some of the K elements of its tokens.
        out_dtype: E4M3, or float16, which holds the same values.

    Returns:
        ``values`` ``[M, K]`` and float32 ``row_scale``, the static scale itself or ``[M, 1]``. Under a dynamic scale
        a token that holds NaN or infinity becomes NaN; under a static one infinity saturates and NaN stays NaN.

    Raises:
        ValueError: a shape or dtype that the kernel does not read.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be [M, K] floats, got {tuple(x.shape)} {x.dtype}")
    check_given(x, smoothing, static_scale, out_dtype)
    if token_amax is not None and (
        static_scale is not None or token_amax.shape != (x.shape[0], 1) or token_amax.dtype != torch.float32
    ):
        raise ValueError(f"token_amax must be float32 [{x.shape[0]}, 1] and alone, got {tuple(token_amax.shape)}")
    if out_dtype == torch.float8_e4m3fn and x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        values, row_scale = _quantize_fp8(x, smoothing, static_scale, token_amax, torch.float16)
        values = values.to(out_dtype)
    else:
        values, row_scale = _quantize_fp8(x, smoothing, static_scale, token_amax, out_dtype)
    return values, row_scale if static_scale is None else static_scale
