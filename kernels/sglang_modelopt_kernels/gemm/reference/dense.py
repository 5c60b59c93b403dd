"""Dense matrix product over a decoded weight: correct on every device, fast on none.

The weight is kept as ``unit`` (codes times block scales) and multiplied by the per-row output scale in the epilogue, so that
only values that the recipe rounds are rounded: on a CPU in fp32, on a GPU in bf16 with fp32 accumulation and output, where every
product of an E4M3 activation and a bf16 ``unit`` is exact.
"""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.formats import e4m3
from sglang_modelopt_kernels.formats.base import DecodedWeight


def prepare_dense(weight: DecodedWeight, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Prepare the tensors that :func:`dense_linear` and :func:`fp8_linear` read.

    Args:
        weight: decoded weight ``[N, K]``.
        dtype: float32, or bf16 or E4M3 where the weight's ``unit`` is exact in it.

    Returns:
        ``(unit, out_scale)``: ``[N, K]`` of ``dtype`` and float32 ``[N]``.

    Raises:
        ValueError: ``unit`` does not survive the conversion to ``dtype``.
    """
    unit = e4m3.to_e4m3(weight.unit) if dtype == torch.float8_e4m3fn else weight.unit.to(dtype)
    if not torch.equal(unit.to(torch.float32), weight.unit):
        raise ValueError(f"the decoded weight is not exact in {dtype}")
    rows = weight.unit.shape[0]
    return unit.contiguous(), weight.out_scale.to(torch.float32).reshape(-1).expand(rows).contiguous()


def dense_linear(
    values: torch.Tensor,
    row_scale: torch.Tensor | None,
    unit: torch.Tensor,
    out_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Compute ``(values @ unit^T) * row_scale * out_scale + bias``, accumulated and scaled in fp32.

    Args:
        values: float32 ``[M, K]``, the rounded activations before their scale.
        row_scale: float32 ``[]`` or ``[M, 1]``, None for 1.
        unit: ``[N, K]`` float32 or bf16.
        out_scale: float32 ``[N]``.
        bias: ``[N]`` or None.

    Returns:
        float32 ``[M, N]``.
    """
    if unit.dtype == torch.float32:
        y = values @ unit.T
    else:
        y = torch.mm(values.to(unit.dtype), unit.T, out_dtype=torch.float32)
    y = y * out_scale
    if row_scale is not None:
        y = y * row_scale
    return y if bias is None else y + bias.to(torch.float32)
