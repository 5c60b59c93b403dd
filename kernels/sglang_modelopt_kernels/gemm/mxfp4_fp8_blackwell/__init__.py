"""MXFP4 weights times FP8 activations in Blackwell's block-scaled matrix instructions (``mxf8f6f4``)."""

from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell.linear import mxfp4_linear, pair_blocks, path_of
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell.naive import naive_mxfp4_linear

__all__ = ["mxfp4_linear", "naive_mxfp4_linear", "pair_blocks", "path_of"]
