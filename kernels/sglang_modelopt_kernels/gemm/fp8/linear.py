"""FP8 product by ``torch._scaled_mm`` (cuBLASLt, CUTLASS) over E4M3 weights with a scale for each output feature.

Every product of two E4M3 values is exact; the sum has the precision of the matrix instruction, promoted to fp32
(``use_fast_accum=False``): on Hopper the FP8 instruction keeps about 14 bits between promotions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


def fp8_linear(
    values: torch.Tensor,
    row_scale: torch.Tensor | None,
    unit: torch.Tensor,
    out_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute ``(values @ unit^T) * row_scale * out_scale + bias``, scaled in fp32 and rounded once.

    Args:
        values: E4M3 ``[M, K]``, the rounded activations before their scale.
        row_scale: float32, one value or ``[M, 1]``; None for 1.
        unit: E4M3 ``[N, K]``, N and K multiples of 16.
        out_scale: float32 ``[N]``.
        bias: ``[N]`` or None.
        out_dtype: type of the result.

    Returns:
        ``[M, N]`` of ``out_dtype``.
    """
    m = values.shape[0]
    if m == 0:
        return torch.empty((0, unit.shape[0]), dtype=out_dtype, device=values.device)
    one = out_scale.new_ones(())
    scale = one if row_scale is None else row_scale
    if out_dtype == torch.bfloat16 and values.is_cuda and torch.cuda.get_device_capability(values.device) == (9, 0):
        # The kernel with scales of rows and columns in its epilogue has bf16 output; other GPUs were not tried.
        rows, columns = scale.reshape(-1, 1).expand(m, 1).contiguous(), out_scale.reshape(1, -1)
        fused = None if bias is None else bias.to(out_dtype)
        return torch._scaled_mm(values, unit.T, scale_a=rows, scale_b=columns, bias=fused, out_dtype=out_dtype)
    y = torch._scaled_mm(values, unit.T, scale_a=one, scale_b=one, out_dtype=torch.float32)
    y = y * out_scale * scale
    return (y if bias is None else y + bias.to(torch.float32)).to(out_dtype)


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
