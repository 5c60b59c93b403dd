"""The naive twin: both sides decoded, one float64 product."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.formats import e2m1, e4m3, ue8m0
from sglang_modelopt_kernels.formats.base import BlockActivation
from sglang_modelopt_kernels.formats.checks import scale_blocks


def naive_fp4_linear(
    x: BlockActivation, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See :func:`fp4_linear`; float64 ``[M, N]``."""
    y = _decode(x.codes, x.scale) @ _decode(codes, scale).T
    if x.row_scale is not None:
        y = y * x.row_scale.to(torch.float64)
    return y if bias is None else y + bias.to(torch.float64)


def _decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    values = e2m1.decode(e2m1.unpack_codes(codes)).to(torch.float64)
    if scale.dtype == torch.float8_e4m3fn:
        return scale_blocks(values, e4m3.decode(scale).to(torch.float64))
    return scale_blocks(values, torch.exp2(scale.to(torch.float64) - ue8m0.BIAS))
