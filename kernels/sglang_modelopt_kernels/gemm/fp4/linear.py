"""Which configuration runs, the launch, and the product as one PyTorch operator."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.formats.base import BlockActivation
from sglang_modelopt_kernels.gemm.tile import Epilogue, KernelConfig, check_epilogue, choose, launch, machine
from sglang_modelopt_kernels.gemm.tile.launch import Plan

from .kernel import fp4_kernel

_TCGEN05 = (
    KernelConfig(128, 16, 256, 4, 4),
    KernelConfig(128, 32, 256, 4, 4),
    KernelConfig(128, 64, 256, 4, 4),
    KernelConfig(128, 128, 256, 8, 3),
)
_MMA = (
    KernelConfig(64, 16, 256, 4, 4),
    KernelConfig(64, 32, 256, 4, 4),
    KernelConfig(128, 64, 256, 8, 3),
    KernelConfig(128, 128, 128, 8, 3),
)
"""Not timed on any GPU: chosen by what compiles to the block-scaled instruction without spilling (``benchmarks.aot``)."""


def configs(capability: int) -> tuple[KernelConfig, ...]:
    """The configurations on compute capability ``capability`` (times ten), by tokens, ascending."""
    return _TCGEN05 if 100 <= capability < 120 else _MMA


def run(
    x: BlockActivation,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Launches the kernel; arguments as :func:`fp4_linear`, ``plan`` instead of the one chosen by size."""
    m, (n, half) = x.codes.shape[0], codes.shape
    capability, processors = machine(x.codes.device)
    return launch(
        fp4_kernel,
        x.codes.contiguous(),
        codes,
        scale,
        Epilogue(out_scale, x.row_scale, bias),
        out_dtype,
        plan or choose(configs(capability), m, n, 2 * half, processors),
        per_entry=2,
        t_ptr=x.scale.contiguous(),
        GROUP=2 * half // scale.shape[1],
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
) -> torch.Tensor:
    if x_codes.shape[0] == 0:
        return torch.empty((0, codes.shape[0]), dtype=out_dtype, device=codes.device)
    return run(BlockActivation(x_codes, x_scale, row_scale), codes, scale, out_scale, bias, out_dtype)


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
) -> torch.Tensor:
    del x_scale, row_scale, scale, out_scale, bias
    return x_codes.new_empty((x_codes.shape[0], codes.shape[0]), dtype=out_dtype)


def fp4_linear(
    x: BlockActivation,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """``x @ W^T + bias`` with ``W = code * block scale * out_scale``.

    Both sides are NVFP4 in blocks of 16, or both MXFP4 in blocks of 32.

    Args:
        x: E2M1 activations ``[M, K]`` under block scales of the weight's type and group.
        codes: uint8 ``[N, K / 2]``, E2M1, the even input in the low half, as ModelOpt stores it.
        scale: E4M3 ``[N, K / 16]`` without NaN, or uint8 ``[N, K / 32]``, UE8M0 without 255.
        out_scale: float32 ``[N]``.
        bias: ``[N]`` or None.
        out_dtype: type of the result.

    Returns:
        ``[M, N]`` of ``out_dtype``.

    Raises:
        ValueError: a shape or dtype that the kernel does not read.
    """
    (n, half), group = codes.shape, 16 if scale.dtype == torch.float8_e4m3fn else 32
    k = 2 * half
    if codes.dtype != torch.uint8 or scale.dtype not in (torch.float8_e4m3fn, torch.uint8):
        raise ValueError(f"codes must be uint8 and scale E4M3 or uint8, got {codes.dtype} and {scale.dtype}")
    if k % group or scale.shape != (n, k // group):
        raise ValueError(f"scale must be [{n}, {k} / {group}], got {tuple(scale.shape)}")
    if x.codes.dtype != torch.uint8 or x.codes.dim() != 2 or x.codes.shape[1] != half:
        raise ValueError(f"x must be uint8 codes [M, {half}], got {tuple(x.codes.shape)} {x.codes.dtype}")
    if x.scale.dtype != scale.dtype or x.scale.shape != (x.codes.shape[0], k // group):
        expected = f"{scale.dtype} [{x.codes.shape[0]}, {k // group}]"
        raise ValueError(f"the block scales of x must be {expected}, got {tuple(x.scale.shape)} {x.scale.dtype}")
    if out_scale.shape != (n,) or out_scale.dtype != torch.float32:
        raise ValueError(f"out_scale must be float32 [{n}], got {tuple(out_scale.shape)} {out_scale.dtype}")
    check_epilogue(x.codes.shape[0], n, x.row_scale, bias)
    y: torch.Tensor = _fp4_linear(x.codes, x.scale, x.row_scale, codes, scale, out_scale, bias, out_dtype)
    return y
