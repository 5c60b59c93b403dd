"""FP8 weights times FP8 activations in FP8 matrix instructions, by ``torch._scaled_mm``."""

from sglang_modelopt_kernels.gemm.fp8.linear import fp8_linear, fp8_linear_in_parts
from sglang_modelopt_kernels.gemm.fp8.naive import naive_fp8_linear

__all__ = ["fp8_linear", "fp8_linear_in_parts", "naive_fp8_linear"]
