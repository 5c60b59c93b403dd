"""Weighted sum over the experts of a token."""

from sglang_modelopt_kernels.moe.combine.combine import combine
from sglang_modelopt_kernels.moe.combine.naive import naive_combine

__all__ = ["combine", "naive_combine"]
