"""FP4 weights times FP4 activations in Blackwell's block-scaled matrix instructions (``mxf4nvf4`` and ``mxf4``)."""

from sglang_modelopt_kernels.gemm.fp4_blackwell.linear import fp4_linear, path_of
from sglang_modelopt_kernels.gemm.fp4_blackwell.naive import naive_fp4_linear

__all__ = ["fp4_linear", "naive_fp4_linear", "path_of"]
