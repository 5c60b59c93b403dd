"""RMSNorm and the rounding of its output to E4M3 in one pass."""

from sglang_modelopt_kernels.quantize.rms_norm.naive import naive_rms_norm_fp8
from sglang_modelopt_kernels.quantize.rms_norm.rms_norm import rms_norm_fp8

__all__ = ["naive_rms_norm_fp8", "rms_norm_fp8"]
