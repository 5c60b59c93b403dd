"""Which configuration runs, the launch, and the product as one PyTorch operator."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.gemm.tile import Epilogue, KernelConfig, check_epilogue, choose, launch, machine
from sglang_modelopt_kernels.gemm.tile.launch import Plan

from .kernel import mxfp4_kernel

CONFIGS = (
    KernelConfig(128, 16, 256, 4, 3),
    KernelConfig(128, 32, 256, 4, 3),
    KernelConfig(128, 64, 256, 4, 3),
    KernelConfig(128, 128, 128, 8, 3),
)
"""By tokens, ascending. Not timed on any GPU: chosen by what compiles to ``mxf8f6f4`` without spilling (``benchmarks.aot``)."""


def run(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Launches the kernel; arguments as :func:`mxfp4_linear`, ``plan`` instead of the one chosen by size."""
    (m, k), n = x.shape, codes.shape[0]
    plan = plan or choose(CONFIGS, m, n, k, machine(x.device)[1])
    return launch(mxfp4_kernel, x.contiguous(), codes, scale, Epilogue(out_scale, row_scale, bias), out_dtype, plan)


@torch.library.custom_op("modelopt_ext::mxfp4_linear", mutates_args=())
def _mxfp4_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    if x.shape[0] == 0:
        return torch.empty((0, codes.shape[0]), dtype=out_dtype, device=x.device)
    return run(x, codes, scale, out_scale, row_scale, bias, out_dtype)


@_mxfp4_linear.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    del scale, out_scale, row_scale, bias
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=out_dtype)


def mxfp4_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    row_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """``(x @ W^T) * row_scale * out_scale + bias`` with ``W = code * 2^(scale - 127)`` (OCP MX v1.0).

    Args:
        x: E4M3 ``[M, K]``.
        codes: uint8 ``[N, K / 2]``, E2M1, the even input in the low half, as ModelOpt stores it.
        scale: uint8 ``[N, K / 32]``, UE8M0, no 255.
        out_scale: float32 ``[N]``.
        row_scale: float32, one value or ``[M, 1]``; None for 1.
        bias: ``[N]`` or None.
        out_dtype: type of the result.

    Returns:
        ``[M, N]`` of ``out_dtype``.

    Raises:
        ValueError: a shape or dtype that the kernel does not read.
    """
    n, k = codes.shape[0], 2 * codes.shape[1]
    if x.dtype != torch.float8_e4m3fn or x.dim() != 2 or x.shape[1] != k:
        raise ValueError(f"x must be E4M3 [M, {k}], got {tuple(x.shape)} {x.dtype}")
    if k % 32 or scale.shape != (n, k // 32) or codes.dtype != torch.uint8 or scale.dtype != torch.uint8:
        raise ValueError(
            f"codes and scale must be uint8 [N, K / 2] and [N, K / 32], got {codes.shape} and {scale.shape}"
        )
    if out_scale.shape != (n,) or out_scale.dtype != torch.float32:
        raise ValueError(f"out_scale must be float32 [{n}], got {tuple(out_scale.shape)} {out_scale.dtype}")
    check_epilogue(x.shape[0], n, row_scale, bias)
    y: torch.Tensor = _mxfp4_linear(x, codes, scale, out_scale, row_scale, bias, out_dtype)
    return y
