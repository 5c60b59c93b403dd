"""Packing for the streamed kernel: tiles of 64 rows and 256 K elements, in the order of the threads that read them.

A tile is 8192 bytes of codes and, in a tensor of its own, its block scales. Thread ``32 w + 4 r + q`` of a warpgroup holds, in
the left operand of ``wgmma``, rows ``16 w + r`` and ``16 w + r + 8``, and of each 32 K elements some that only ``q`` says. It
reads its words of codes (32 bits, 8 codes of one row) 16 bytes at a time: word ``(b2, r3, w, r, q, j)`` of the tile, in this
order, is of row ``16 w + 8 r3 + r`` and of the K elements ``32 (4 b2 + j) ..``.

* MXFP4: the words of :mod:`sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper.packing`. Scales are folded exponents, 8 for each row.
* NVFP4, in blocks of 16 or 32: half ``i`` of a word holds K elements ``16 s + 8 h + 2 q + i`` in the planes ``2 s + h`` of
  :mod:`sglang_modelopt_kernels.formats.fp4_packing.packing`. Scales are stored bytes, 16 or 8
  for each row.

The scales of a tile are in the order ``(w, r, r3)`` of their rows, so that a thread reads both of its rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch

from sglang_modelopt_kernels.formats import e2m1, e4m3
from sglang_modelopt_kernels.formats.base import BlockWeight
from sglang_modelopt_kernels.formats.checks import check_tensor, scale_blocks
from sglang_modelopt_kernels.formats.fp4_packing.packing import gather_bits, scatter_bits
from sglang_modelopt_kernels.formats.nvfp4 import NVFP4, NVFP4_BLOCK32
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper.packing import FoldedWeight, unfold

Kind = Literal["folded", "scaled_16", "scaled_32"]
"""How codes and block scales are read; NVFP4 in blocks of 16 and of 32."""
ROWS, WIDTH = 64, 256
"""Output features and K elements of a tile."""
BLOCKS: dict[Kind, int] = {"folded": 8, "scaled_16": 16, "scaled_32": 8}
"""Block scales of a row in a tile."""
PACK_ENTRIES = 1 << 24
"""At most this many codes are packed at a time: their integers take many times the memory of the result."""


@dataclass(frozen=True)
class StreamedWeight:
    """A weight kept tile by tile: ``W = code * block scale * out_scale``.

    Attributes:
        codes: uint8 ``[N, K / 2]``; the bytes are those of tile after tile, along K first.
        scale: uint8 ``[N, K / block]``, tile after tile.
        out_scale: float32 ``[N]``.
        kind: how codes and scales are read.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    out_scale: torch.Tensor
    kind: Kind

    @property
    def n(self) -> int:
        """Output features."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Input features."""
        return 2 * self.codes.shape[1]


def check_kind(kind: str) -> Kind:
    """Narrow a kind that came through an operator as a string. Raises ValueError for an unknown one."""
    known = next((one for one in get_args(Kind) if one == kind), None)
    if known is None:
        raise ValueError(f"unknown kind of streamed weight: {kind!r}")
    return cast(Kind, known)


def nvfp4_kind(group: int) -> Kind:
    """Return the kind of NVFP4 weights in blocks of ``group``. Raises ValueError for other blocks than of 16 and 32."""
    if group not in (16, 32):
        raise ValueError(f"NVFP4 has blocks of 16 or 32, not {group}")
    return "scaled_16" if group == 16 else "scaled_32"


def check_tiles(n: int, k: int) -> None:
    """Raise ValueError unless N and K are whole tiles."""
    if n % ROWS or k % WIDTH:
        raise ValueError(f"needs N in {ROWS}s and K in {WIDTH}s, not {n} x {k}")


def stream_folded(weight: FoldedWeight) -> StreamedWeight:
    """Put a folded MXFP4 weight into tiles. Raises ValueError unless N and K are whole tiles."""
    check_tiles(weight.n, weight.k)
    words = weight.codes.view(weight.n, -1, 4, 4)
    return StreamedWeight(
        _codes_to_tiles(words).view_as(weight.codes),
        _scales_to_tiles(weight.exponent, BLOCKS["folded"]).view_as(weight.exponent),
        weight.out_scale,
        "folded",
    )


def stream_nvfp4(weight: BlockWeight) -> StreamedWeight:
    """Put an NVFP4 weight in blocks of 16 or 32 into tiles.

    Raises:
        ValueError: N and K are no whole tiles, the number type is another, or an E4M3 scale is NaN or negative (the kernel reads
            their bits).
    """
    n, k = weight.codes.shape
    check_tiles(n, k)
    if weight.number_type not in (NVFP4, NVFP4_BLOCK32):
        raise ValueError(f"packing: expected {NVFP4} or {NVFP4_BLOCK32}, got {weight.number_type}")
    kind = nvfp4_kind(weight.group)
    check_tensor("block scales", weight.scale, weight.scale.dtype, (n, k // weight.group))
    if bool((e4m3.byte_is_nan(weight.scale) | e4m3.byte_is_negative(weight.scale)).any()):
        raise ValueError("an E4M3 block scale is NaN or negative")
    rows = max(PACK_ENTRIES // k, 1)
    words = torch.cat([_pack_words(part) for part in weight.codes.split(rows)])
    scale = weight.scale.view(torch.uint8)
    out_scale = weight.out_scale.to(torch.float32).reshape(-1).expand(n).contiguous()
    tiles = _scales_to_tiles(scale, BLOCKS[kind]).view_as(scale)
    return StreamedWeight(_codes_to_tiles(words).view(n, k // 2), tiles, out_scale, kind)


def unstream(weight: StreamedWeight) -> torch.Tensor:
    """Return the weight without its ``out_scale``, float64 ``[N, K]``: the naive reading of what the kernel reads."""
    words = _codes_from_tiles(weight.codes)
    scale = _scales_from_tiles(weight.scale, BLOCKS[weight.kind])
    if weight.kind == "folded":
        return unfold(FoldedWeight(words.reshape(weight.codes.shape), scale, weight.out_scale))
    codes = e2m1.decode(_unpack_words(words)).to(torch.float64)
    return scale_blocks(codes, e4m3.decode(scale.view(torch.float8_e4m3fn)).to(torch.float64))


def _pack_words(codes: torch.Tensor) -> torch.Tensor:
    """Return NVFP4 codes ``[N, K]`` as words, uint8 ``[N, K / 32, 4, 4]``: block of 32, ``q``, byte."""
    planes = codes.to(torch.int32).unflatten(1, (-1, 4, 4, 2)).movedim(2, -1)  # [N, block of 32, q, half, plane]
    halves = gather_bits(planes)
    return torch.stack((halves & 255, halves >> 8), dim=-1).to(torch.uint8).flatten(3)


def _unpack_words(words: torch.Tensor) -> torch.Tensor:
    """Return the codes that :func:`_pack_words` packed, uint8 ``[N, K]``."""
    parts = words.to(torch.int32).unflatten(3, (2, 2))
    planes = scatter_bits(parts[..., 0] | parts[..., 1] << 8)
    return planes.movedim(-1, 2).flatten(1).to(torch.uint8)


def _codes_to_tiles(words: torch.Tensor) -> torch.Tensor:
    """Reorder words, uint8 ``[N, K / 32, q, byte]``, to tiles."""
    # [tile, w, r3, r, step, b2, j, q, byte] to [tile, step, b2, r3, w, r, q, j, byte]
    split = words.unflatten(1, (-1, 2, 4)).unflatten(0, (-1, 4, 2, 8))
    return split.permute(0, 4, 5, 2, 1, 3, 7, 6, 8).contiguous()


def _codes_from_tiles(codes: torch.Tensor) -> torch.Tensor:
    """Return the words ``[N, K / 32, q, byte]`` that tiles hold."""
    n, steps = codes.shape[0], codes.shape[1] // (WIDTH // 2)
    tiles = codes.reshape(n // ROWS, steps, 2, 2, 4, 8, 4, 4, 4)
    return tiles.permute(0, 4, 3, 5, 1, 2, 7, 6, 8).reshape(n, -1, 4, 4)


def _scales_to_tiles(scale: torch.Tensor, blocks: int) -> torch.Tensor:
    """Reorder block scales ``[N, K / block]``, ``blocks`` of a row to a tile, to tiles."""
    # [tile, w, r3, r, step, block] to [tile, step, w, r, r3, block]
    split = scale.unflatten(1, (-1, blocks)).unflatten(0, (-1, 4, 2, 8))
    return split.permute(0, 4, 1, 3, 2, 5).contiguous()


def _scales_from_tiles(scale: torch.Tensor, blocks: int) -> torch.Tensor:
    """Return the block scales ``[N, K / block]`` that tiles hold."""
    n, steps = scale.shape[0], scale.shape[1] // blocks
    tiles = scale.reshape(n // ROWS, steps, 4, 8, 2, blocks)
    return tiles.permute(0, 2, 4, 3, 1, 5).reshape(n, -1)
