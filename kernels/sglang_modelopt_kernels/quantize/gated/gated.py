"""SwiGLU with rounding as one PyTorch operator. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

import torch
import triton

from sglang_modelopt_kernels.early import early
from sglang_modelopt_kernels.quantize.fp8.quantize import WHOLE, casts, check_given, quantize_given

from .kernel import swiglu_fp8_kernel

BLOCK = 1024
"""Values of a token that a program computes: its exponentials and divisions take most of the time, so that many share a token."""


@torch.library.custom_op("modelopt_ext::swiglu_fp8", mutates_args=())
def _swiglu_fp8(
    h: torch.Tensor,
    smoothing: torch.Tensor | None,
    static_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, k = h.shape[0], h.shape[1] // 2
    gated = torch.empty((m, k), dtype=h.dtype, device=h.device)
    y = torch.empty((m, k), dtype=out_dtype, device=h.device)
    row_scale = torch.empty((0 if static_scale is not None else m, 1), dtype=torch.float32, device=h.device)
    if m == 0:
        return gated, y, row_scale
    block = min(BLOCK, triton.next_power_of_2(k))
    parts = triton.cdiv(k, block)
    # More than one part of a token share a scale only when all are known: another launch rounds then.
    apart = parts > 1 and static_scale is None
    amax = torch.empty((m, parts), dtype=torch.float32, device=h.device) if apart else row_scale
    swiglu_fp8_kernel[(m, parts)](
        h,
        # A pointer stands for an absent tensor; the kernel never reads through it.
        h if smoothing is None else smoothing.contiguous(),
        row_scale if static_scale is None else static_scale,
        gated,
        y,
        row_scale,
        amax,
        k,
        h.stride(0),
        SMOOTH=smoothing is not None,
        STATIC=static_scale is not None,
        WHOLE=parts == 1,
        CAST=casts(h.device),
        BLOCK=block,
        num_warps=4,
        **early(h.device),
    )
    if apart:
        quantize_given(gated, smoothing, amax, y, row_scale)
    return gated, y, row_scale


@_swiglu_fp8.register_fake
def _(
    h: torch.Tensor,
    smoothing: torch.Tensor | None,
    static_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del smoothing
    m, k = h.shape[0], h.shape[1] // 2
    rows = 0 if static_scale is not None else m
    return h.new_empty((m, k)), h.new_empty((m, k), dtype=out_dtype), h.new_empty((rows, 1), dtype=torch.float32)


def swiglu_fp8(
    h: torch.Tensor,
    smoothing: torch.Tensor | None = None,
    static_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute ``silu(gate) * up`` for ``h = [gate, up]`` and round it to E4M3: ``gated, values, row_scale``.

    ``gated`` is computed in fp32 and rounded to the type of ``h``. Values and scale are, bit for bit, those of :func:`quantize_fp8`
    for ``gated``.

    Args:
        h: ``[M, 2 * K]`` in fp16, bf16 or fp32, rows contiguous, K at most 16384.
        smoothing: ``[K]`` of a float type, multiplied before rounding to E4M3; None for 1.
        static_scale: float32, one value; None for a scale for each token.
        out_dtype: E4M3, or float16, which holds the same values.

    Raises:
        ValueError: a shape or dtype that the kernel does not read.
    """
    if h.dim() != 2 or h.shape[1] % 2 or h.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"h must be [M, 2 * K] in fp32, fp16 or bf16, got {tuple(h.shape)} {h.dtype}")
    if h.stride(1) != 1 or h.shape[1] > 2 * WHOLE:
        raise ValueError(f"h must have contiguous rows of at most {2 * WHOLE} values, got {h.shape[1]}")
    check_given(h[:, : h.shape[1] // 2], smoothing, static_scale, out_dtype)
    gated, values, row_scale = _swiglu_fp8(h, smoothing, static_scale, out_dtype)
    return gated, values, row_scale if static_scale is None else static_scale
