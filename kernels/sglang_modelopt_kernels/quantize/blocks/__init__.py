"""Smoothing and rounding of activations under block scales in one pass: NVFP4, MXFP4 and MXFP8."""

from sglang_modelopt_kernels.quantize.blocks.naive import naive_quantize_blocks, naive_swizzle, naive_unswizzle
from sglang_modelopt_kernels.quantize.blocks.quantize import BLOCK_ACTIVATIONS, quantize_blocks, round_blocks, rounds

__all__ = [
    "BLOCK_ACTIVATIONS",
    "naive_quantize_blocks",
    "naive_swizzle",
    "naive_unswizzle",
    "quantize_blocks",
    "round_blocks",
    "rounds",
]
