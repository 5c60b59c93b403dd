"""The naive twin: the stored weight decoded, one float64 product."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.formats import e2m1, ue8m0
from sglang_modelopt_kernels.formats.checks import scale_blocks


def naive_mxfp4_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`mxfp4_linear`; float64 ``[M, N]``."""
    values = e2m1.decode(e2m1.unpack_codes(codes)).to(torch.float64)
    weight = scale_blocks(values, torch.exp2(scale.to(torch.float64) - ue8m0.BIAS))
    y = x.to(torch.float64) @ weight.T
    if row_scale is not None:
        y = y * row_scale.to(torch.float64)
    return y if bias is None else y + bias.to(torch.float64)
