"""MXFP4 weights times FP8 activations on SM89 and SM90: codes and block exponents become E4M3 values in registers."""

from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper.linear import folded_linear, path_of
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper.naive import naive_folded_linear
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper.packing import FoldedWeight, fold, unfold

__all__ = ["FoldedWeight", "fold", "folded_linear", "naive_folded_linear", "path_of", "unfold"]
