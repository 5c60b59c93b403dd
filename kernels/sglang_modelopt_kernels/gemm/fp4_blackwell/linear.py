"""Choice of the configuration, the launch, and the product as one PyTorch operator."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.formats.base import BlockActivation
from sglang_modelopt_kernels.gemm.blackwell_common import takes_tiles, tcgen05_product, tiles_of
from sglang_modelopt_kernels.gemm.common import Epilogue, KernelConfig, check_epilogue, choose, launch, machine, path
from sglang_modelopt_kernels.gemm.common.launch import Plan

from .kernel import fp4_kernel

SWIZZLED_CONFIGS = (
    KernelConfig(128, 16, 256, 4, 4),
    KernelConfig(128, 32, 256, 4, 4),
    KernelConfig(128, 64, 256, 4, 4),
    KernelConfig(128, 128, 256, 8, 4),
    KernelConfig(128, 256, 256, 8, 4, persistent=True),
)
CONFIGS = (
    KernelConfig(64, 16, 256, 4, 4),
    KernelConfig(64, 32, 256, 4, 4),
    KernelConfig(128, 64, 256, 8, 3),
    KernelConfig(128, 128, 128, 8, 3),
)
"""Configurations ascending by BM: for swizzled scales (SM100, SM103), and for others (SM120). Not timed on any GPU: those that
compile to the block-scaled instruction without spilling (``benchmarks.aot``)."""


def plan_of(swizzled: bool, m: int, n: int, k: int, device: torch.device) -> Plan:
    """Return the plan of :func:`run` for a product of M, N and K on ``device``."""
    return choose(SWIZZLED_CONFIGS if swizzled else CONFIGS, m, n, k, machine(device)[1])


def path_of(swizzled: bool, m: int, n: int, k: int, device: torch.device) -> tuple[object, ...]:
    """Return what :func:`fp4_linear` runs for a product of M, N and K on ``device``: equal for all M with one launch."""
    return *path(plan_of(swizzled, m, n, k, device), m, n, machine(device)[1]), swizzled and takes_tiles(m)


def run(
    x: BlockActivation,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    swizzled: bool = False,
    plan: Plan | None = None,
    describe: bool = True,
) -> torch.Tensor:
    """Launch the kernel; arguments of :func:`fp4_linear`, and ``plan`` instead of the choice by size."""
    m, (n, half) = x.codes.shape[0], codes.shape
    group = 16 if scale.dtype == torch.float8_e4m3fn else 32
    plan = plan or plan_of(swizzled, m, n, 2 * half, x.codes.device)
    epilogue = Epilogue(out_scale, x.row_scale, bias)
    if swizzled:
        return tcgen05_product(x.codes, codes, scale, x.scale, group, epilogue, out_dtype, plan, describe)
    return launch(
        fp4_kernel,
        x.codes.contiguous(),
        codes,
        scale,
        epilogue,
        out_dtype,
        plan,
        per_entry=2,
        t_ptr=x.scale.contiguous(),
        GROUP=group,
        NATIVE=codes.is_cuda,
    )


@torch.library.custom_op("modelopt_ext::fp4_linear", mutates_args=())
def _fp4_linear(
    x_codes: torch.Tensor,
    x_scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    swizzled: bool,
) -> torch.Tensor:
    if x_codes.shape[0] == 0:
        return torch.empty((0, codes.shape[0]), dtype=out_dtype, device=codes.device)
    return run(BlockActivation(x_codes, x_scale, row_scale), codes, scale, out_scale, bias, out_dtype, swizzled)


@_fp4_linear.register_fake
def _(
    x_codes: torch.Tensor,
    x_scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    swizzled: bool,
) -> torch.Tensor:
    del x_scale, row_scale, scale, out_scale, bias, swizzled
    return x_codes.new_empty((x_codes.shape[0], codes.shape[0]), dtype=out_dtype)


def fp4_linear(
    x: BlockActivation,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    swizzled: bool = False,
) -> torch.Tensor:
    """Compute ``x @ W^T + bias`` with ``W = code * block scale * out_scale``.

    Both sides are NVFP4 in blocks of 16, or both MXFP4 in blocks of 32.

    Args:
        x: E2M1 activations ``[M, K]`` under block scales of the dtype and group of the weight's.
        codes: uint8 ``[N, K / 2]``, E2M1, the even K element in the low half, as ModelOpt stores it.
        scale: E4M3 ``[N, K / 16]`` without NaN, or uint8 ``[N, K / 32]``, UE8M0 without 255.
        out_scale: float32 ``[N]``.
        bias: ``[N]`` or None.
        out_dtype: dtype of the result.
        swizzled: whether ``scale`` has the 128x4 swizzled layout (:func:`naive_swizzle`), for SM100 and SM103. The scales of ``x``
            then have it where :func:`takes_tiles` is true for M.

    Returns:
        ``[M, N]`` of ``out_dtype``.

    Raises:
        ValueError: a shape or dtype that the kernel does not read.
    """
    (n, half), group = codes.shape, 16 if scale.dtype == torch.float8_e4m3fn else 32
    k = 2 * half
    if codes.dtype != torch.uint8 or scale.dtype not in (torch.float8_e4m3fn, torch.uint8):
        raise ValueError(f"codes must be uint8 and scale E4M3 or uint8, got {codes.dtype} and {scale.dtype}")
    m, blocks = x.codes.shape[0], k // group
    if k % group or scale.shape != (tiles_of(n, blocks) if swizzled else (n, blocks)):
        raise ValueError(f"scale must be [{n}, {k} / {group}]{', swizzled' * swizzled}, got {tuple(scale.shape)}")
    if x.codes.dtype != torch.uint8 or x.codes.dim() != 2 or x.codes.shape[1] != half:
        raise ValueError(f"x must be uint8 codes [M, {half}], got {tuple(x.codes.shape)} {x.codes.dtype}")
    shape = tiles_of(m, blocks) if swizzled and takes_tiles(m) else (m, blocks)
    if x.scale.dtype != scale.dtype or x.scale.shape != shape:
        expected = f"{scale.dtype} {list(shape)}"
        raise ValueError(f"the block scales of x must be {expected}, got {tuple(x.scale.shape)} {x.scale.dtype}")
    if out_scale.shape != (n,) or out_scale.dtype != torch.float32:
        raise ValueError(f"out_scale must be float32 [{n}], got {tuple(out_scale.shape)} {out_scale.dtype}")
    check_epilogue(m, n, x.row_scale, bias)
    y: torch.Tensor = _fp4_linear(x.codes, x.scale, x.row_scale, codes, scale, out_scale, bias, out_dtype, swizzled)
    return y
