"""Activation between the two products of an expert: gated or not, with or without a bias and a limit."""

from sglang_modelopt_kernels.moe.activation.activate import activate
from sglang_modelopt_kernels.moe.activation.function import SWIGLU, Activation, Function
from sglang_modelopt_kernels.moe.activation.naive import naive_activate

__all__ = ["SWIGLU", "Activation", "Function", "activate", "naive_activate"]
