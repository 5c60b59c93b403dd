"""Choice of the configuration, the launch, and the product as one PyTorch operator."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.gemm.blackwell_common import tcgen05_product, tiles_of
from sglang_modelopt_kernels.gemm.common import Epilogue, KernelConfig, check_epilogue, choose, launch, machine, path
from sglang_modelopt_kernels.gemm.common.launch import Plan

from .kernel import mxfp4_widened_kernel

CONFIGS = (
    KernelConfig(128, 16, 256, 4, 4),
    KernelConfig(128, 32, 256, 4, 4),
    KernelConfig(128, 64, 256, 4, 4),
    KernelConfig(128, 128, 256, 8, 3),
    KernelConfig(128, 256, 128, 8, 4, persistent=True),
)
ROW_CONFIGS = (
    KernelConfig(128, 16, 256, 4, 3),
    KernelConfig(128, 32, 256, 4, 3),
    KernelConfig(128, 64, 256, 4, 3),
    KernelConfig(128, 128, 128, 8, 3),
)
PAIRED_CONFIGS = (
    KernelConfig(64, 16, 256, 4, 3),
    KernelConfig(64, 32, 256, 4, 3),
    KernelConfig(128, 64, 128, 8, 3),
    KernelConfig(128, 128, 128, 8, 2),
)
"""Configurations ascending by BM: for swizzled scales, for others (:func:`mxfp4_sum`), and for SM120. Not timed on any GPU: those
that compile to ``mxf8f6f4`` without spilling (``benchmarks.aot``)."""

WIDENED_DESCALE = 64.0
"""Factor of the accumulators of SM120, whose codes are converted to E4M3 times 2^-6."""


def pair_blocks(codes: torch.Tensor) -> torch.Tensor:
    """Pair the blocks of stored codes ``[N, K / 2]``: every second block moves to the high halves of the bytes of the one before.

    Byte j of 32 holds K elements j and 32 + j of 64, so that the low and the high codes of the bytes are whole blocks in order.

    Raises:
        ValueError: codes that are not uint8, or K is not a multiple of 64.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] % 32:
        raise ValueError(f"codes: expected uint8 [N, K / 2] with K in 64s, got {codes.dtype} {list(codes.shape)}")
    even, odd = codes.unflatten(1, (-1, 2, 16)).unbind(2)  # the bytes of a pair's first and second block
    return torch.stack(((even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0)), dim=-1).flatten(1)


def plan_of(paired: bool, m: int, n: int, k: int, device: torch.device) -> Plan:
    """Return the plan of :func:`run` for a product of M, N and K on ``device``."""
    return choose(PAIRED_CONFIGS if paired else CONFIGS, m, n, k, machine(device)[1])


def path_of(paired: bool, m: int, n: int, k: int, device: torch.device) -> tuple[object, ...]:
    """Return what :func:`mxfp4_linear` runs for a product of M, N and K on ``device``: equal for all M with one launch."""
    return path(plan_of(paired, m, n, k, device), m, n, machine(device)[1])


def run(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    paired: bool = False,
    plan: Plan | None = None,
    describe: bool = True,
) -> torch.Tensor:
    """Launch the kernel; arguments of :func:`mxfp4_linear`, and ``plan`` instead of the choice by size."""
    (m, k), n = x.shape, codes.shape[0]
    plan = plan or plan_of(paired, m, n, k, x.device)
    epilogue = Epilogue(out_scale, row_scale, bias, WIDENED_DESCALE if paired else 1.0)
    if not paired:
        return tcgen05_product(x, codes, scale, None, 32, epilogue, out_dtype, plan, describe)
    return launch(mxfp4_widened_kernel, x.contiguous(), codes, scale, epilogue, out_dtype, plan, ASM=x.is_cuda)


@torch.library.custom_op("modelopt_ext::mxfp4_linear", mutates_args=())
def _mxfp4_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    paired: bool,
) -> torch.Tensor:
    if x.shape[0] == 0:
        return torch.empty((0, codes.shape[0]), dtype=out_dtype, device=x.device)
    return run(x, codes, scale, out_scale, row_scale, bias, out_dtype, paired)


@_mxfp4_linear.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    paired: bool,
) -> torch.Tensor:
    del scale, out_scale, row_scale, bias, paired
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=out_dtype)


def mxfp4_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    row_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    paired: bool = False,
) -> torch.Tensor:
    """Compute ``(x @ W^T) * row_scale * out_scale + bias`` with ``W = code * 2^(scale - 127)`` (OCP MX v1.0).

    Args:
        x: E4M3 ``[M, K]``.
        codes: uint8 ``[N, K / 2]``, E2M1, the even K element in the low half, as ModelOpt stores it.
        scale: uint8, UE8M0, no 255: ``[N, K / 32]``, in the 128x4 swizzled layout (:func:`naive_swizzle`) unless ``paired``.
        out_scale: float32 ``[N]``.
        row_scale: float32, one value or ``[M, 1]``; None for 1.
        bias: ``[N]`` or None.
        out_dtype: dtype of the result.
        paired: whether ``codes`` come from :func:`pair_blocks`, for SM120; K is then a multiple of 64.

    Returns:
        ``[M, N]`` of ``out_dtype``.

    Raises:
        ValueError: a shape or dtype that the kernel does not read.
    """
    n, k = codes.shape[0], 2 * codes.shape[1]
    if x.dtype != torch.float8_e4m3fn or x.dim() != 2 or x.shape[1] != k:
        raise ValueError(f"x must be E4M3 [M, {k}], got {tuple(x.shape)} {x.dtype}")
    shape = (n, k // 32) if paired else tiles_of(n, k // 32)
    if k % 32 or scale.shape != shape or codes.dtype != torch.uint8 or scale.dtype != torch.uint8:
        expected = f"uint8 [N, K / 2] and {list(shape)}"
        raise ValueError(f"codes and scale must be {expected}, got {tuple(codes.shape)} and {tuple(scale.shape)}")
    if paired and k % 64:
        raise ValueError(f"K must be a multiple of 64 where blocks are paired, got {k}")
    if out_scale.shape != (n,) or out_scale.dtype != torch.float32:
        raise ValueError(f"out_scale must be float32 [{n}], got {tuple(out_scale.shape)} {out_scale.dtype}")
    check_epilogue(x.shape[0], n, row_scale, bias)
    y: torch.Tensor = _mxfp4_linear(x, codes, scale, out_scale, row_scale, bias, out_dtype, paired)
    return y
