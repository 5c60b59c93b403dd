"""Products of 4-bit weights in the block-scaled matrix instructions (tcgen05) of SM100 and SM103, E2M1 or E4M3 activations.

Naive twins: :func:`gemm.fp4_blackwell.naive_fp4_linear` for E2M1 activations and
:func:`gemm.mxfp4_fp8_blackwell.naive_mxfp4_linear` for E4M3 ones, of scales that are not swizzled.
"""

from sglang_modelopt_kernels.gemm.blackwell_common.launch import (
    takes_tiles,
    tcgen05_product,
    tiles_of,
)

__all__ = ["takes_tiles", "tcgen05_product", "tiles_of"]
