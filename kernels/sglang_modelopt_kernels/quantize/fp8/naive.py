"""The naive twin: the formats' own rounding, one operation after the other."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.formats.fp8 import FP8DynamicPerToken, FP8StaticPerTensor


def naive_quantize_fp8(
    x: torch.Tensor,
    smoothing: torch.Tensor | None,
    static_scale: torch.Tensor | None,
    token_amax: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`quantize_fp8`; the values in float32."""
    wide = x.to(torch.float32)
    if smoothing is not None:
        wide = wide * smoothing.to(torch.float32)
    if static_scale is not None:
        return FP8StaticPerTensor().quantize(wide, static_scale)
    return FP8DynamicPerToken().quantize(wide, token_amax)
