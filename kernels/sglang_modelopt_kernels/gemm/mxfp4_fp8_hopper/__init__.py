"""MXFP4 weights as E4M3 numbers, codes and exponents folded together in registers, times FP8 activations (SM89 and SM90)."""

from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper.linear import folded_linear, path_of
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper.packing import FoldedWeight, fold, unfold

__all__ = ["FoldedWeight", "fold", "folded_linear", "path_of", "unfold"]
