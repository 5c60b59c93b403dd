"""Activations as codes under block scales, and the order of block scales that Blackwell's matrix instructions read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from sglang_modelopt_kernels.formats import e2m1
from sglang_modelopt_kernels.formats.base import ActivationFormat
from sglang_modelopt_kernels.formats.checks import no_scale, static_scale
from sglang_modelopt_kernels.formats.mxfp4 import MXFP4Dynamic
from sglang_modelopt_kernels.formats.mxfp8 import MXFP8Dynamic
from sglang_modelopt_kernels.formats.nvfp4 import NVFP4DynamicBlock

SCALE_ROWS, SCALE_COLUMNS = 128, 4
"""What block scales are padded to for :func:`swizzle_128x4`."""


@dataclass(frozen=True)
class BlockActivations:
    """Activations as their recipe rounds them: ``x = code * block_scale * scale``.

    Attributes:
        codes: E2M1, two to a byte (the even input in the low half), uint8 ``[M, K / 2]``; or E4M3 ``[M, K]``.
        block_scale: e4m3 or uint8 (UE8M0), ``[M, K / group]``.
        scale: float32 ``[]``, None for 1.
    """

    codes: torch.Tensor
    block_scale: torch.Tensor
    scale: torch.Tensor | None


def encode_blocks(activation: ActivationFormat | None, x: torch.Tensor, scale: torch.Tensor | None) -> BlockActivations:
    """Rounds float32 ``x`` ``[M, K]`` bit for bit as :meth:`ActivationFormat.quantize` does, and keeps the codes.

    Raises ValueError for a format without blocks, and as the format's own ``encode`` does.
    """
    if isinstance(activation, NVFP4DynamicBlock):
        scale = static_scale(scale)
        codes, block_scale = activation.encode(x, scale)
        return BlockActivations(e2m1.pack_codes(codes), block_scale, scale)
    no_scale(scale)
    if isinstance(activation, MXFP4Dynamic):
        codes, block_scale = activation.encode(x)
        return BlockActivations(e2m1.pack_codes(codes), block_scale, None)
    if isinstance(activation, MXFP8Dynamic):
        return BlockActivations(*activation.encode(x), None)
    raise ValueError(f"{activation.name if activation else 'unrounded'} activations have no block scales")


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
