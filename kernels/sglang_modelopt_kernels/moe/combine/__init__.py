"""The weighted sum over a token's experts."""

from sglang_modelopt_kernels.moe.combine.combine import combine
from sglang_modelopt_kernels.moe.combine.naive import naive_combine

__all__ = ["combine", "naive_combine"]
