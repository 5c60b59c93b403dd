"""Smoothing and FP8 rounding of activations in one pass."""

from sglang_modelopt_kernels.quantize.fp8.naive import naive_quantize_fp8
from sglang_modelopt_kernels.quantize.fp8.quantize import quantize_fp8, rounds

__all__ = ["naive_quantize_fp8", "quantize_fp8", "rounds"]
