"""FP8 product by ``torch._scaled_mm`` (cuBLASLt, CUTLASS) over E4M3 weights with a scale for each output feature.

Every product of two E4M3 values is exact; the sum has the precision of the matrix instruction, promoted to fp32
(``use_fast_accum=False``): on Hopper the FP8 instruction keeps about 14 bits between promotions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from sglang_modelopt_kernels.gemm.common import Epilogue

FEW_TOKENS = 128
"""Up to this many tokens scales of rows are applied in a launch of their own. cuBLAS has one kernel with such scales in its
epilogue, of 128 x 128 tiles. The four products of an 8B layer take 129 us by it with one token and 100 with 128, and 72 and 90
without (H200); with 256 it is the faster one."""

_ONES: dict[torch.device, torch.Tensor] = {}


@torch.library.custom_op("modelopt_ext::fp8_linear", mutates_args=())
def _fp8_linear(
    values: torch.Tensor,
    row_scale: torch.Tensor | None,
    unit: torch.Tensor,
    out_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    uniform: bool,
) -> torch.Tensor:
    m, n = values.shape[0], unit.shape[0]
    if m == 0:
        return torch.empty((0, n), dtype=out_dtype, device=values.device)
    one_row_scale = row_scale is None or row_scale.numel() == 1
    # cuBLAS adds a bias of the result's type only.
    fused = None if bias is None else bias.to(out_dtype)
    if uniform and one_row_scale and (bias is None or out_dtype != torch.float32):
        scale = _one(values.device) if row_scale is None else row_scale.reshape(())
        return torch._scaled_mm(values, unit.T, scale_a=scale, scale_b=out_scale[0], bias=fused, out_dtype=out_dtype)
    if m > FEW_TOKENS and _scales_rows(values.device) and out_dtype == torch.bfloat16:
        scale = _one(values.device) if row_scale is None else row_scale
        rows, columns = scale.reshape(-1, 1).expand(m, 1).contiguous(), out_scale.reshape(1, -1)
        return torch._scaled_mm(values, unit.T, scale_a=rows, scale_b=columns, bias=fused, out_dtype=out_dtype)
    one = _one(values.device)
    product = torch._scaled_mm(values, unit.T, scale_a=one, scale_b=one, out_dtype=torch.float32)
    if values.is_cuda:
        y = torch.empty((m, n), dtype=out_dtype, device=values.device)
        Epilogue(out_scale, row_scale, bias).finish(product.unsqueeze(0), y)
        return y
    product = product * out_scale * (one if row_scale is None else row_scale)
    return (product if bias is None else product + bias.to(torch.float32)).to(out_dtype)


@_fp8_linear.register_fake
def _(
    values: torch.Tensor,
    row_scale: torch.Tensor | None,
    unit: torch.Tensor,
    out_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    uniform: bool,
) -> torch.Tensor:
    del row_scale, out_scale, bias, uniform
    return values.new_empty((values.shape[0], unit.shape[0]), dtype=out_dtype)


def fp8_linear(
    values: torch.Tensor,
    row_scale: torch.Tensor | None,
    unit: torch.Tensor,
    out_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    uniform: bool = False,
) -> torch.Tensor:
    """Compute ``(values @ unit^T) * row_scale * out_scale + bias``, scaled in fp32 and rounded once.

    Args:
        values: E4M3 ``[M, K]``, the rounded activations before their scale.
        row_scale: float32, one value or ``[M, 1]``; None for 1.
        unit: E4M3 ``[N, K]``, N and K multiples of 16.
        out_scale: float32 ``[N]``.
        bias: ``[N]`` or None.
        out_dtype: type of the result.
        uniform: whether all of ``out_scale`` are known to be equal, so that one stands for all.

    Returns:
        ``[M, N]`` of ``out_dtype``.
    """
    y: torch.Tensor = _fp8_linear(values, row_scale, unit, out_scale, bias, out_dtype, uniform)
    return y


def _scales_rows(device: torch.device) -> bool:
    """Return whether cuBLAS has the kernel with scales of rows and columns, of bf16 output; it was tried on SM90 only."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _one(device: torch.device) -> torch.Tensor:
    """Return 1 as float32 on a device, made once: to fill it takes a launch."""
    if device not in _ONES:
        one = torch.ones((), dtype=torch.float32, device=device)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return one  # filled by the graph, in memory of the graph
        _ONES[device] = one
    return _ONES[device]


def fp8_linear_in_parts(
    values: torch.Tensor,
    row_scale: torch.Tensor | None,
    decode: Callable[[slice], torch.Tensor],
    parts: Iterable[slice],
    out_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute :func:`fp8_linear` by a weight that is decoded some rows at a time.

    Args:
        values, row_scale, out_scale, bias, out_dtype: those of :func:`fp8_linear`.
        decode: returns some rows of the weight, E4M3 ``[rows, K]``.
        parts: the rows of each time, one below the other.
    """
    outputs = [
        fp8_linear(values, row_scale, decode(part), out_scale[part], None if bias is None else bias[part], out_dtype)
        for part in parts
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
