"""4-bit weights in the block-scaled matrix instructions of SM100 and SM103, whatever the activations' element."""

from sglang_modelopt_kernels.gemm.blackwell_common.launch import (
    takes_tiles,
    tcgen05_product,
    tiles_of,
)

__all__ = ["takes_tiles", "tcgen05_product", "tiles_of"]
