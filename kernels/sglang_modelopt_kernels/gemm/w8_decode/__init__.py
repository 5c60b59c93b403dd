"""Product with 8-bit weights (Triton): INT8, FP8 under scales of tensors, channels or blocks, and MXFP8."""

from sglang_modelopt_kernels.gemm.w8_decode.linear import MOST_INPUTS_INT8, eight_bit_linear, path_of
from sglang_modelopt_kernels.gemm.w8_decode.naive import naive_eight_bit_linear
from sglang_modelopt_kernels.gemm.w8_decode.packing import (
    ByteWeight,
    float_blocks,
    mxfp8,
    rows_of,
    unpack,
    whole,
)

__all__ = [
    "MOST_INPUTS_INT8",
    "ByteWeight",
    "eight_bit_linear",
    "float_blocks",
    "mxfp8",
    "naive_eight_bit_linear",
    "path_of",
    "rows_of",
    "unpack",
    "whole",
]
