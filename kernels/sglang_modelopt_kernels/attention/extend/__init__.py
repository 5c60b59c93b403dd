"""New tokens of each request over a packed prefix and over themselves, unrounded."""

from sglang_modelopt_kernels.attention.extend.extend import extend_attention
from sglang_modelopt_kernels.attention.extend.naive import naive_extend

__all__ = ["extend_attention", "naive_extend"]
