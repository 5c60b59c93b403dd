"""FP8 weights and activations in FP8 matrix instructions. The naive twin is that of the dense product."""

from sglang_modelopt_kernels.gemm.fp8.linear import fp8_linear

__all__ = ["fp8_linear"]
