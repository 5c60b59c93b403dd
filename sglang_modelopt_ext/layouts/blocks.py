"""The order of block scales that Blackwell's matrix instructions read."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

SCALE_ROWS, SCALE_COLUMNS = 128, 4
"""What block scales are padded to for :func:`swizzle_128x4`."""


def swizzle_128x4(scale: torch.Tensor) -> torch.Tensor:
    """Block scales ``[R, C]`` of one byte in the order of Blackwell's matrix instructions, zeros where there are none.

    The scale at ``(r, c)`` of the matrix padded to multiples of 128 and 4 goes to byte
    ``(r // 128 * C / 4 + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4``: cuBLAS, "1D block scaling factors layout".

    Returns:
        uint8, with the padded shape.
    """
    rows, columns = scale.shape
    full = pad(scale.view(torch.uint8), (0, -columns % SCALE_COLUMNS, 0, -rows % SCALE_ROWS))
    tiles = full.view(full.shape[0] // SCALE_ROWS, 4, 32, full.shape[1] // SCALE_COLUMNS, SCALE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(full.shape)
