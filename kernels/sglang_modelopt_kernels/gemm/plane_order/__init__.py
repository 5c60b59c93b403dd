"""Activations permuted into the order of the planes of 4-bit weights (``formats/fp4_packing``)."""

from sglang_modelopt_kernels.gemm.plane_order.naive import naive_order
from sglang_modelopt_kernels.gemm.plane_order.order import order

__all__ = ["naive_order", "order"]
