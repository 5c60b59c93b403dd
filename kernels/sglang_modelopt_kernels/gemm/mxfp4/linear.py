"""Which configuration runs, the launch, and the product as one PyTorch operator."""

from __future__ import annotations

import torch
import triton

from sglang_modelopt_kernels.gemm.block_scaled.kernel import finish_kernel
from sglang_modelopt_kernels.gemm.block_scaled.launch import KernelConfig, machine, splits

from .kernel import mxfp4_kernel

CONFIGS = (
    KernelConfig(128, 16, 256, 4, 3),
    KernelConfig(128, 32, 256, 4, 3),
    KernelConfig(128, 64, 256, 4, 3),
    KernelConfig(128, 128, 128, 8, 3),
)
"""By tokens, ascending. Not timed on any GPU: chosen by what compiles to ``mxf8f6f4`` without spilling (``benchmarks.aot``)."""


def choose(m: int, n: int, k: int, processors: int) -> tuple[KernelConfig, int]:
    """The configuration and the number of splits along K for ``m`` tokens."""
    config = next((config for config in CONFIGS if m <= config.bm), CONFIGS[-1])
    tiles = triton.cdiv(n, config.bn) * triton.cdiv(m, config.bm)
    return config, splits(tiles * config.warps, triton.cdiv(k, config.bk), processors)


def run(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: tuple[KernelConfig, int] | None = None,
) -> torch.Tensor:
    """Launches the kernel; arguments as :func:`mxfp4_linear`, ``plan`` instead of :func:`choose`'s."""
    (m, k), n = x.shape, codes.shape[0]
    x = x.contiguous()
    config, split = plan or choose(m, n, k, machine(x.device)[1])
    y = torch.empty((m, n), dtype=out_dtype, device=x.device)
    target = torch.empty((split, m, n), dtype=torch.float32, device=x.device) if split > 1 else y
    row_step = int(row_scale is not None and row_scale.numel() > 1)
    # The kernels take a pointer for what is absent and never read through it.
    row_scales = out_scale if row_scale is None else row_scale.contiguous()
    biases = out_scale if bias is None else bias.contiguous()
    epilogue = {"HAS_ROW_SCALE": row_scale is not None, "HAS_BIAS": bias is not None}
    mxfp4_kernel[(triton.cdiv(n, config.bn), triton.cdiv(m, config.bm), split)](
        x,
        codes,
        scale,
        row_scales,
        out_scale,
        biases,
        target,
        m,
        n,
        k,
        row_step,
        EVEN_K=k % config.bk == 0,
        SPLIT_K=split,
        BN=config.bn,
        BM=config.bm,
        BK=config.bk,
        num_warps=config.warps,
        num_stages=config.stages,
        **epilogue,
    )
    if split > 1:
        finish_kernel[(m, triton.cdiv(n, 1024))](
            target,
            row_scales,
            out_scale,
            biases,
            y,
            m,
            n,
            n,
            row_step,
            DESCALE=1.0,
            SPLITS=split,
            BN=1024,
            **epilogue,
        )
    return y


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
    if row_scale is not None and (row_scale.dtype != torch.float32 or row_scale.numel() not in (1, x.shape[0])):
        raise ValueError(f"row_scale must be 1 or {x.shape[0]} float32, got {row_scale.numel()} {row_scale.dtype}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be [{n}], got {tuple(bias.shape)}")
    y: torch.Tensor = _mxfp4_linear(x, codes, scale, out_scale, row_scale, bias, out_dtype)
    return y
