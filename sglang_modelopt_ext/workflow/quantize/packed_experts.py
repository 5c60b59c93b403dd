"""Packed experts (gpt-oss, Llama 4) exported with blocks along K, where ModelOpt 0.47 alone would lay them along N."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

BY_MODELOPT = ("NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN")
"""The algorithms in which ModelOpt 0.47 itself exports packed experts as its simulation rounds them."""

TRANSPOSED = ("W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "MXFP4", "MXFP8")
"""Those whose blocks it lays along the last dimension of the stored ``[E, K, N]``, which is N; its simulation has them along K."""


@contextlib.contextmanager
def blocks_along_k() -> Iterator[None]:
    """Transpose packed experts for ModelOpt's packing and back while the block runs, as it does itself for NVFP4.

    What is stored has the layout of its NVFP4: ``[E, K / 2, N]`` codes of four bits, or ``[E, K, N]`` of eight, and
    ``[E, K / block, N]`` scales.
    """
    from modelopt.torch.export import unified_export_hf

    inner = unified_export_hf._export_quantized_weight

    def export(module: torch.nn.Module, dtype: torch.dtype, weight_name: str = "weight") -> None:
        along_n = _has_blocks_along_n(module, weight_name)
        if along_n:
            _transpose(module, weight_name)
        inner(module, dtype, weight_name)
        if along_n:
            _transpose(module, weight_name)
            _transpose(module, f"{weight_name}_weight_scale")

    unified_export_hf._export_quantized_weight = export
    try:
        yield
    finally:
        unified_export_hf._export_quantized_weight = inner


def _has_blocks_along_n(module: Any, weight_name: str) -> bool:
    from modelopt.torch.export.quant_utils import get_quantization_format

    # ModelOpt's own names of these formats are the algorithms' in lower case.
    return getattr(module, weight_name).dim() == 3 and str(get_quantization_format(module)).upper() in TRANSPOSED


def _transpose(module: Any, name: str) -> None:
    """Replace a tensor ``[E, A, B]`` of a module by its contiguous ``[E, B, A]``."""
    tensor = getattr(module, name)
    swapped = tensor.detach().transpose(-1, -2).contiguous()
    if isinstance(tensor, torch.nn.Parameter):
        swapped = torch.nn.Parameter(swapped, requires_grad=False)
    setattr(module, name, swapped)
