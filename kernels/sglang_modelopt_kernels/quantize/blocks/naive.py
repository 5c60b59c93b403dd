"""Naive twin of rounding under block scales: the activation formats' own rounding; and the 128x4 swizzled layout."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.formats import ACTIVATION_FORMATS
from sglang_modelopt_kernels.formats.base import BlockActivation


def naive_quantize_blocks(
    x: torch.Tensor, activation: str, smoothing: torch.Tensor | None = None, input_scale: torch.Tensor | None = None
) -> BlockActivation:
    """Round as :func:`quantize_blocks` does, scales not swizzled. Raises ValueError for a format without blocks."""
    x_fp32 = x.to(torch.float32)
    if smoothing is not None:
        x_fp32 = x_fp32 * smoothing.to(torch.float32)
    rounded = ACTIVATION_FORMATS[activation].blocks(x_fp32, input_scale)
    if rounded is None:
        raise ValueError(f"{activation} has no block scales")
    return rounded


def naive_swizzle(scale: torch.Tensor) -> torch.Tensor:
    """Swizzle block scales ``[M, B]`` to the 128x4 layout of Blackwell's matrix instructions, padded with zeros.

    The scale of row r and block c of a tile is byte ``16 (r % 32) + 4 (r / 32) + c`` of its 512 (PTX ISA, tcgen05, scale factors
    with ``scale_vec::4X``; cuBLAS, "1D Block Scaling Factors Layout"). Tiles lie along the blocks first.
    """
    m, blocks = scale.shape
    rows, columns = -(-m // 128) * 128, -(-blocks // 4) * 4
    padded = torch.zeros((rows, columns), dtype=torch.uint8, device=scale.device)
    padded[:m, :blocks] = scale.view(torch.uint8)
    tiles = padded.view(rows // 128, 4, 32, columns // 4, 4)  # tile, r / 32, r % 32, tile, c
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns).view(scale.dtype)


def naive_unswizzle(tiles: torch.Tensor, rows: int, blocks: int) -> torch.Tensor:
    """Return the block scales ``[rows, blocks]`` of which :func:`naive_swizzle` made ``tiles``."""
    down, across = -(-rows // 128), -(-blocks // 4)
    stored = tiles.view(torch.uint8).reshape(down, across, 32, 4, 4)  # tile, tile, r % 32, r / 32, c
    scale = stored.permute(0, 3, 2, 1, 4).reshape(128 * down, 4 * across)[:rows, :blocks]
    return scale.contiguous().view(tiles.dtype)
