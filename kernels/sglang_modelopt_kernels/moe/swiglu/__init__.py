"""Gated activation between the two products of an expert."""

from sglang_modelopt_kernels.moe.swiglu.naive import naive_swiglu
from sglang_modelopt_kernels.moe.swiglu.swiglu import swiglu

__all__ = ["naive_swiglu", "swiglu"]
