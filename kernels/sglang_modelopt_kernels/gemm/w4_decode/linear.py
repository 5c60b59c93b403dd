"""The product as one PyTorch operator: graphs and compilers see neither its launches nor its choice by M."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_modelopt_kernels.gemm.common import check_epilogue, machine, path

from .launch import plan_of, run, run_dense, run_fp8, run_groups
from .packing import PackedWeight, check_kind

DENSE_FROM = 2049
"""Tokens from which an E2M1 weight is decoded once for cuBLAS, instead of in every token tile. Measured on an H100."""
FP8_FROM = 129
"""Tokens from which a weight whose values are E4M3 is decoded once for FP8 matrix instructions. Measured on an H100."""
GROUPS_FROM = 257
"""Tokens from which INT4 is decoded once for the group-scaled product.

Measured on an H100 (``benchmarks/results``), as the thresholds above: where one more tile costs more than the decoding pass.
"""

INPUT_DTYPES = (torch.float8_e4m3fn, torch.float16, torch.bfloat16)


@torch.library.custom_op("modelopt_ext::block_scaled_linear", mutates_args=())
def _block_scaled_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    kind: str,
    group: int,
    fp8: bool,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    weight = PackedWeight(codes, scale, out_scale, check_kind(kind), group, fp8)
    if x.shape[0] == 0:
        return torch.empty((0, weight.n), dtype=out_dtype, device=x.device)
    return _choose(weight, x.shape[0], x.dtype, out_dtype, x.device)(x, weight, row_scale, bias, out_dtype)


def path_of(
    weight: PackedWeight, m: int, dtype: torch.dtype, out_dtype: torch.dtype, device: torch.device
) -> tuple[object, ...]:
    """Return what :func:`block_scaled_linear` runs for ``m`` tokens of ``dtype`` on ``device``: equal for all M with one launch."""
    chosen = _choose(weight, m, dtype, out_dtype, device)
    plan = path(plan_of(weight, m, device), m, weight.n, machine(device)[1]) if chosen is run else ()
    return chosen.__name__, *plan


def _choose(
    weight: PackedWeight, m: int, dtype: torch.dtype, out_dtype: torch.dtype, device: torch.device
) -> Callable[..., torch.Tensor]:
    """Return the launch for ``m`` tokens. All form the same exact products; the rounding of the sum differs.

    FP8 matrix instructions keep about 13 bits of it on Hopper, more than bf16 and fp16 results show and less than fp32.
    """
    if device.type != "cuda":
        return run
    if weight.kind == "int4_float":
        return run_groups if m >= GROUPS_FROM else run
    in_fp8 = weight.fp8 and dtype == torch.float8_e4m3fn and weight.n % 16 == 0 and out_dtype != torch.float32
    if in_fp8 and m >= FP8_FROM and machine(device)[0] >= 89:
        return run_fp8
    return run_dense if m >= DENSE_FROM else run


@_block_scaled_linear.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    kind: str,
    group: int,
    fp8: bool,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    del scale, out_scale, kind, group, fp8, row_scale, bias
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=out_dtype)


def block_scaled_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    row_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Compute ``(x @ unit^T) * row_scale * out_scale + bias`` with exact products and an fp32 sum.

    Args:
        x: ``[M, K]`` in FP8 E4M3 or float16 (multiplied in float16) or bf16 (multiplied in bf16).
        weight: the packed weight ``[N, K]``.
        row_scale: float32, one value or ``[M, 1]``, any strides; None for 1.
        bias: ``[N]`` of any float type, or None.
        out_dtype: type of the result.

    Returns:
        ``[M, N]`` of ``out_dtype``, rounded once.

    Raises:
        ValueError: a dtype or shape that the kernel does not read.
    """
    if x.dtype not in INPUT_DTYPES or x.dim() != 2 or x.shape[1] != weight.k:
        raise ValueError(f"x must be [M, {weight.k}] in fp8, fp16 or bf16, got {tuple(x.shape)} {x.dtype}")
    check_epilogue(x.shape[0], weight.n, row_scale, bias)
    y: torch.Tensor = _block_scaled_linear(
        x,
        weight.codes,
        weight.scale,
        weight.out_scale,
        weight.kind,
        weight.group,
        weight.fp8,
        row_scale,
        bias,
        out_dtype,
    )
    return y
