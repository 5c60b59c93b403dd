"""RMSNorm with rounding as one PyTorch operator. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.early import early
from sglang_modelopt_kernels.quantize.fp8.quantize import WHOLE, casts, check_given, token_block

from .kernel import rms_norm_fp8_kernel


@torch.library.custom_op("modelopt_ext::rms_norm_fp8", mutates_args=("residual", "normed"))
def _rms_norm_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    normed: torch.Tensor,
    smoothing: torch.Tensor | None,
    static_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = x.shape
    y = torch.empty((m, k), dtype=out_dtype, device=x.device)
    row_scale = torch.empty((0 if static_scale is not None else m, 1), dtype=torch.float32, device=x.device)
    if m == 0:
        return y, row_scale
    block = token_block(k)
    rms_norm_fp8_kernel[(m,)](
        # A pointer stands for an absent tensor; the kernel never reads through it.
        x,
        x if residual is None else residual,
        weight,
        weight if smoothing is None else smoothing.contiguous(),
        row_scale if static_scale is None else static_scale,
        normed,
        y,
        row_scale,
        k,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        HAS_RESIDUAL=residual is not None,
        SMOOTH=smoothing is not None,
        STATIC=static_scale is not None,
        BLOCK=block["BLOCK"],
        num_warps=block["num_warps"],
        CAST=casts(x.device),
        **early(x.device),
    )
    return y, row_scale


@_rms_norm_fp8.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    normed: torch.Tensor,
    smoothing: torch.Tensor | None,
    static_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    del weight, eps, residual, normed, smoothing
    rows = 0 if static_scale is not None else x.shape[0]
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty((rows, 1), dtype=torch.float32)


def rms_norm_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    smoothing: torch.Tensor | None = None,
    static_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalize tokens and round them to E4M3: ``normed, values, row_scale``.

    ``normed`` is ``t * rsqrt(mean(t * t) + eps) * weight`` for ``t = x + residual``, in fp32, rounded to the type of ``x``.
    Values and scale are, bit for bit, those of :func:`quantize_fp8` for ``normed``.

    Args:
        x: ``[M, K]`` in fp16, bf16 or fp32, rows contiguous, K at most 16384.
        weight: ``[K]`` of a float type.
        eps: added to the mean of the squares.
        residual: ``[M, K]`` of the type of ``x``, both contiguous, replaced by ``t``; ``normed`` takes the place of ``x``. None for
            zeros, and ``normed`` is a new tensor.
        smoothing: ``[K]`` of a float type, multiplied before rounding to E4M3; None for 1.
        static_scale: float32, one value; None for a scale for each token.
        out_dtype: E4M3, or float16, which holds the same values.

    Raises:
        ValueError: a shape or dtype that the kernel does not read.
    """
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or x.stride(1) != 1:
        raise ValueError(f"x must be [M, K] in fp32, fp16 or bf16 with contiguous rows, got {tuple(x.shape)} {x.dtype}")
    if x.shape[1] > WHOLE or weight.shape != x.shape[1:]:
        raise ValueError(f"weight must be [{x.shape[1]}] and at most {WHOLE} long, got {tuple(weight.shape)}")
    if residual is not None and (
        residual.shape != x.shape or residual.dtype != x.dtype or residual.stride(1) != 1 or not x.is_contiguous()
    ):
        raise ValueError(f"residual must be as x and both contiguous, got {tuple(residual.shape)} {residual.dtype}")
    check_given(x, smoothing, static_scale, out_dtype)
    normed = torch.empty_like(x, memory_format=torch.contiguous_format) if residual is None else x
    values, row_scale = _rms_norm_fp8(x, weight.contiguous(), eps, residual, normed, smoothing, static_scale, out_dtype)
    return normed, values, row_scale if static_scale is None else static_scale
