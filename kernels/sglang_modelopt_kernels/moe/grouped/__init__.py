"""Product of all experts: every row times the weight of its expert, in any of the weight formats."""

from sglang_modelopt_kernels.moe.grouped.grouped import grouped_linear, path_of, tile
from sglang_modelopt_kernels.moe.grouped.naive import naive_grouped_linear
from sglang_modelopt_kernels.moe.grouped.weights import (
    GroupedWeight,
    float_blocks,
    mxfp4_as_stored,
    mxfp8,
    packed,
    stack,
    tiled,
    unpack,
    whole,
)

__all__ = [
    "GroupedWeight",
    "float_blocks",
    "grouped_linear",
    "mxfp4_as_stored",
    "mxfp8",
    "naive_grouped_linear",
    "packed",
    "path_of",
    "stack",
    "tile",
    "tiled",
    "unpack",
    "whole",
]
