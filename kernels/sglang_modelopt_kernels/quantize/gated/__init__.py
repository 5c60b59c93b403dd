"""The gated activation SwiGLU and the rounding of its output to E4M3 in one pass."""

from sglang_modelopt_kernels.quantize.gated.gated import swiglu_fp8
from sglang_modelopt_kernels.quantize.gated.naive import naive_swiglu_fp8

__all__ = ["naive_swiglu_fp8", "swiglu_fp8"]
