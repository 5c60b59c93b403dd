"""Choice of the configuration, the launches, and the product as one PyTorch operator."""

from __future__ import annotations

import torch
import triton

from sglang_modelopt_kernels.gemm.common import Epilogue, KernelConfig, check_epilogue, choose, launch, machine, path
from sglang_modelopt_kernels.gemm.common.launch import Plan, few
from sglang_modelopt_kernels.gemm.fp8 import fp8_linear_in_parts
from sglang_modelopt_kernels.gemm.w4_decode.launch import row_parts

from .kernel import folded_kernel, unfold_kernel
from .packing import FoldedWeight

DENSE_FROM = 897
"""Tokens from which the weight is decoded once for ``torch._scaled_mm``: measured on an H100 at 512, where tiles of 128 tokens take
0.75 of its time, and at 1024, where they take 1.06."""

# One warpgroup, so that several programs share an SM and one decodes while another multiplies: the fastest on an H100
# (benchmarks.tiles). Each thread loads at least four exponents (BN * BK / 32), or Triton does not pipeline the loads.
_WARP_GROUP = (
    KernelConfig(64, 16, 256, 4, 4),
    KernelConfig(64, 32, 256, 4, 3),
    KernelConfig(64, 64, 256, 4, 4),
    KernelConfig(64, 128, 256, 4, 3),
)
# The others were not timed: those that compile to FP8 matrix instructions without spilling (benchmarks.aot).
_MMA = (
    KernelConfig(64, 16, 256, 4, 3),
    KernelConfig(64, 32, 256, 4, 3),
    KernelConfig(64, 64, 256, 4, 3),
)
# For K that is no multiple of 256.
_WARP_GROUP_HALF = (
    KernelConfig(128, 16, 128, 4, 4),
    KernelConfig(128, 32, 128, 4, 4),
    KernelConfig(128, 64, 128, 8, 4),
    KernelConfig(128, 128, 128, 8, 4),
)
_MMA_HALF = (
    KernelConfig(64, 16, 128, 2, 3),
    KernelConfig(64, 32, 128, 4, 3),
    KernelConfig(64, 64, 128, 4, 3),
    KernelConfig(128, 128, 128, 8, 2),
)


def configs(capability: int, k: int = 256) -> tuple[KernelConfig, ...]:
    """Return the configurations for ``k`` on compute capability ``capability`` (times ten), ascending by BM."""
    if 90 <= capability < 100:
        return _WARP_GROUP_HALF if k % 256 else _WARP_GROUP
    return _MMA_HALF if k % 256 else _MMA


def plan_of(weight: FoldedWeight, m: int, device: torch.device) -> Plan:
    """Return the plan of :func:`run` for ``m`` tokens on ``device``."""
    capability, sms = machine(device)
    return choose(configs(capability, weight.k), m, weight.n, weight.k, sms)


def run(
    x: torch.Tensor,
    weight: FoldedWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Launch the kernel; arguments of :func:`folded_linear`, and ``plan`` instead of the choice by size."""
    plan = plan or plan_of(weight, x.shape[0], x.device)
    epilogue = Epilogue(weight.out_scale, row_scale, bias)
    return launch(
        folded_kernel,
        x.contiguous(),
        weight.codes,
        weight.exponent,
        epilogue,
        out_dtype,
        plan,
        ASM=x.is_cuda,
        TILED=False,
        **few(x, plan[0]),
    )


def unfold_rows(weight: FoldedWeight, first: int, rows: int) -> torch.Tensor:
    """Decode rows of the weight to E4M3, ``[rows, K]``, without ``out_scale``."""
    y = torch.empty((rows, weight.k), dtype=torch.uint8, device=weight.codes.device)
    grid = (triton.cdiv(rows, 8), triton.cdiv(weight.k, 512))
    words = (weight.codes.view(torch.int32), weight.exponent, y.view(torch.int32))
    unfold_kernel[grid](*words, first, rows, weight.k, ASM=y.is_cuda, BN=8)
    return y.view(torch.float8_e4m3fn)


def run_dense(
    x: torch.Tensor,
    weight: FoldedWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply many tokens: rows decoded into a bounded scratch buffer, then :func:`fp8_linear_in_parts`.

    Arguments of :func:`folded_linear`.
    """

    def decode(part: slice) -> torch.Tensor:
        return unfold_rows(weight, part.start, part.stop - part.start)

    parts = row_parts(weight.n, weight.k)
    return fp8_linear_in_parts(x, row_scale, decode, parts, weight.out_scale, bias, out_dtype)


@torch.library.custom_op("modelopt_ext::folded_linear", mutates_args=())
def _folded_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    exponent: torch.Tensor,
    out_scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    weight = FoldedWeight(codes, exponent, out_scale)
    if x.shape[0] == 0:
        return torch.empty((0, weight.n), dtype=out_dtype, device=x.device)
    launched = run_dense if _takes_dense(weight, x.shape[0], x.device) else run
    return launched(x, weight, row_scale, bias, out_dtype)


def _takes_dense(weight: FoldedWeight, m: int, device: torch.device) -> bool:
    return device.type == "cuda" and m >= DENSE_FROM and weight.n % 16 == 0


def path_of(weight: FoldedWeight, m: int, device: torch.device) -> tuple[object, ...]:
    """Return what :func:`folded_linear` runs for ``m`` tokens on ``device``: equal for all M with one launch."""
    if _takes_dense(weight, m, device):
        return ("run_dense",)
    return "run", *path(plan_of(weight, m, device), m, weight.n, machine(device)[1])


@_folded_linear.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    exponent: torch.Tensor,
    out_scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    del exponent, out_scale, row_scale, bias
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=out_dtype)


def folded_linear(
    x: torch.Tensor,
    weight: FoldedWeight,
    row_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Compute ``(x @ W^T) * row_scale + bias`` with exact products of E4M3 values.

    Args:
        x: E4M3 ``[M, K]``.
        weight: the packed weight ``[N, K]``.
        row_scale: float32, one value or ``[M, 1]``; None for 1.
        bias: ``[N]`` or None.
        out_dtype: type of the result.

    Returns:
        ``[M, N]`` of ``out_dtype``, rounded once.

    Raises:
        ValueError: a shape or dtype that the kernel does not read.
    """
    if x.dtype != torch.float8_e4m3fn or x.dim() != 2 or x.shape[1] != weight.k:
        raise ValueError(f"x must be E4M3 [M, {weight.k}], got {tuple(x.shape)} {x.dtype}")
    check_epilogue(x.shape[0], weight.n, row_scale, bias)
    y: torch.Tensor = _folded_linear(x, weight.codes, weight.exponent, weight.out_scale, row_scale, bias, out_dtype)
    return y
