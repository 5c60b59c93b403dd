"""Extend attention: new tokens of each request over their packed prefix, and over themselves without quantization."""

from sglang_modelopt_kernels.attention.extend.extend import extend_attention
from sglang_modelopt_kernels.attention.extend.naive import naive_extend

__all__ = ["extend_attention", "naive_extend"]
