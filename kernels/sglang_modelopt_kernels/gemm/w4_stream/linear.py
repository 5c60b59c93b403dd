"""The product as one PyTorch operator: graphs and compilers see neither its launches nor its choice by M."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.gemm.common import check_epilogue, machine, path

from .launch import DENSE_FROM, operand, plan_of, run, run_dense
from .packing import StreamedWeight, check_kind


@torch.library.custom_op("modelopt_ext::streamed_linear", mutates_args=())
def _streamed_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    kind: str,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    weight = StreamedWeight(codes, scale, out_scale, check_kind(kind))
    if x.shape[0] == 0:
        return torch.empty((0, weight.n), dtype=out_dtype, device=x.device)
    launched = run_dense if x.shape[0] >= DENSE_FROM[weight.kind] else run
    return launched(x, weight, row_scale, bias, out_dtype)


def path_of(weight: StreamedWeight, m: int, device: torch.device) -> tuple[object, ...]:
    """Return what :func:`streamed_linear` runs for ``m`` tokens on ``device``: equal for all M with one launch."""
    if m >= DENSE_FROM[weight.kind]:
        return ("run_dense",)
    return "run", *path(plan_of(weight, m, device), m, weight.n, machine(device)[1])


@_streamed_linear.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out_scale: torch.Tensor,
    kind: str,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    del scale, out_scale, kind, row_scale, bias
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=out_dtype)


def streamed_linear(
    x: torch.Tensor,
    weight: StreamedWeight,
    row_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Compute ``(x @ unit^T) * row_scale * out_scale + bias`` with exact products.

    Args:
        x: ``[M, K]``, E4M3 for MXFP4 weights and float16 for NVFP4.
        weight: the packed weight ``[N, K]``.
        row_scale: float32, one value or ``[M, 1]``; None for 1.
        bias: ``[N]`` or None.
        out_dtype: type of the result.

    Returns:
        ``[M, N]`` of ``out_dtype``, rounded once.

    Raises:
        ValueError: a shape or dtype that the kernel does not read.
    """
    wanted = operand(weight.kind)
    if x.dtype != wanted or x.dim() != 2 or x.shape[1] != weight.k:
        raise ValueError(f"x must be {wanted} [M, {weight.k}], got {tuple(x.shape)} {x.dtype}")
    check_epilogue(x.shape[0], weight.n, row_scale, bias)
    y: torch.Tensor = _streamed_linear(
        x, weight.codes, weight.scale, weight.out_scale, weight.kind, row_scale, bias, out_dtype
    )
    return y
