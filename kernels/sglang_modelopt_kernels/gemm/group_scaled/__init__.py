"""A dense product in which the sum of each group of inputs is scaled (Triton): INT4 for many tokens."""

from sglang_modelopt_kernels.gemm.group_scaled.launch import config_for, multiply

__all__ = ["config_for", "multiply"]
