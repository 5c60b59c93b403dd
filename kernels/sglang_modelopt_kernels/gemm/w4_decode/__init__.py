"""Product with 4-bit weights under block scales, decoded in registers (Triton): NVFP4, MXFP4 and INT4."""

from sglang_modelopt_kernels.gemm.w4_decode.linear import DENSE_FROM, block_scaled_linear, path_of
from sglang_modelopt_kernels.gemm.w4_decode.naive import naive_block_scaled_linear
from sglang_modelopt_kernels.gemm.w4_decode.packing import PackedWeight, pack, unpack
from sglang_modelopt_kernels.gemm.w4_decode.rows import block_scaled_rows

__all__ = [
    "DENSE_FROM",
    "PackedWeight",
    "block_scaled_linear",
    "block_scaled_rows",
    "naive_block_scaled_linear",
    "pack",
    "path_of",
    "unpack",
]
