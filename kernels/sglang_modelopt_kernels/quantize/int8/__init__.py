"""Smoothing and INT8 rounding of activations in one pass."""

from sglang_modelopt_kernels.quantize.int8.naive import naive_quantize_int8
from sglang_modelopt_kernels.quantize.int8.quantize import quantize_int8, rounds

__all__ = ["naive_quantize_int8", "quantize_int8", "rounds"]
