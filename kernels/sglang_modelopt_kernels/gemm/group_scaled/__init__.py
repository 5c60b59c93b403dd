"""Dense product in which the sum over each group of K elements is scaled (Triton): INT4 and FP8 in blocks for many tokens."""

from sglang_modelopt_kernels.gemm.group_scaled.launch import config_for, multiply
from sglang_modelopt_kernels.gemm.group_scaled.naive import naive_multiply

__all__ = ["config_for", "multiply", "naive_multiply"]
