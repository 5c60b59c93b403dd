"""The product as one PyTorch operator: graphs and compilers see neither its launches nor its choice by M."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_modelopt_kernels.gemm.common import check_epilogue, machine, path

from .launch import math_of, plan_of, run, run_dense, run_int8, takes_dense, takes_int_mm
from .packing import KINDS, ByteWeight

DENSE_FROM = 1024
"""Tokens from which a weight is decoded once for cuBLAS instead of in every token tile, and int8 x int8 runs there. Not timed."""
MOST_INPUTS_INT8 = (1 << 17) - 1
"""Largest K whose sum of int8 products, each at most 2^14, always fits int32."""


@torch.library.custom_op("modelopt_ext::eight_bit_linear", mutates_args=())
def _eight_bit_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    out_scale: torch.Tensor,
    kind: str,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of weight: {kind!r}")
    weight = ByteWeight(codes, scale, out_scale, kind)
    if x.shape[0] == 0:
        return torch.empty((0, weight.n), dtype=out_dtype, device=x.device)
    return _choose(weight, x.shape[0], x.dtype, x.device)(x, weight, row_scale, bias, out_dtype)


def path_of(weight: ByteWeight, m: int, dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
    """Return what :func:`eight_bit_linear` runs for ``m`` tokens of ``dtype`` on ``device``: equal for all M with one launch."""
    chosen = _choose(weight, m, dtype, device)
    plan = path(plan_of(weight, m, dtype, device), m, weight.n, machine(device)[1]) if chosen is run else ()
    return chosen.__name__, *plan


def _choose(weight: ByteWeight, m: int, dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    """Return the launch for ``m`` tokens. All form the same exact products; the rounding of an fp32 sum differs."""
    if device.type != "cuda" or m < DENSE_FROM:
        return run
    if dtype == torch.int8:
        return run_int8 if takes_int_mm(m, weight.n, weight.k, machine(device)[0]) else run
    return run_dense if takes_dense(weight) else run


@_eight_bit_linear.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    out_scale: torch.Tensor,
    kind: str,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    del scale, out_scale, kind, row_scale, bias
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=out_dtype)


def eight_bit_linear(
    x: torch.Tensor,
    weight: ByteWeight,
    row_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Compute ``(x @ unit^T) * row_scale * out_scale + bias`` with exact products, and an fp32 sum or, of int8, an exact one.

    Args:
        x: ``[M, K]`` in float16 or bf16, for int8 weights in int8 too; bf16 alone for ``e4m3_exponent``.
        weight: the weight ``[N, K]``.
        row_scale: float32, one value or ``[M, 1]``, any strides; None for 1.
        bias: ``[N]`` of any float type, or None.
        out_dtype: type of the result.

    Returns:
        ``[M, N]`` of ``out_dtype``, rounded once.

    Raises:
        ValueError: a dtype or shape that the kernel does not read.
    """
    if x.dim() != 2 or x.shape[1] != weight.k:
        raise ValueError(f"x must be [M, {weight.k}], got {tuple(x.shape)}")
    math = math_of(weight.kind, x.dtype)
    if math == "i8" and weight.k > MOST_INPUTS_INT8:
        raise ValueError(f"K must be at most {MOST_INPUTS_INT8} for an int32 sum of int8 products, got {weight.k}")
    check_epilogue(x.shape[0], weight.n, row_scale, bias)
    y: torch.Tensor = _eight_bit_linear(
        x, weight.codes, weight.scale, weight.out_scale, weight.kind, row_scale, bias, out_dtype
    )
    return y
