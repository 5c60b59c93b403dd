"""Packing E2M1 codes for kernels, along the last dimension.

Element ``i`` holds the codes of entries ``16 * (i // 4) + 4 * q + i % 4`` for the planes ``q`` = 0..3. Two elements fill a 32-bit
register, which is what one matrix instruction takes of each plane, so that decoding moves nothing between lanes; and the
four codes of an element belong to one block scale, because blocks have at least 16 entries.
"""

from __future__ import annotations

import torch

SIGN_BIT = (15, 12, 14, 13)
MAGNITUDE_BIT = (9, 6, 3, 0)
"""Per plane of an element. Plane 0 is where float16 has its sign and the low end of its exponent."""


def split_planes(codes: torch.Tensor) -> torch.Tensor:
    """Return codes ``[..., K]`` as int32 ``[..., K / 4, 4]``, planes last."""
    return codes.to(torch.int32).unflatten(-1, (-1, 4, 4)).transpose(-1, -2).flatten(-3, -2)


def join_planes(planes: torch.Tensor) -> torch.Tensor:
    """Join planes ``[..., K / 4, 4]`` to codes ``[..., K]``: the inverse of :func:`split_planes`."""
    return planes.unflatten(-2, (-1, 4)).transpose(-1, -2).flatten(-3)


def as_int16(element: torch.Tensor) -> torch.Tensor:
    """Return the low 16 bits of non-negative int32 elements."""
    return torch.where(element >= 1 << 15, element - (1 << 16), element).to(torch.int16).contiguous()


def gather_bits(planes: torch.Tensor) -> torch.Tensor:
    """Return the 16 bits of elements, int32, from the codes of their planes, int32 ``[..., 4]``."""
    element = torch.zeros_like(planes[..., 0])
    for plane in range(4):
        code = planes[..., plane]
        element |= (code >> 3) << SIGN_BIT[plane] | (code & 7) << MAGNITUDE_BIT[plane]
    return element


def scatter_bits(element: torch.Tensor) -> torch.Tensor:
    """Return the codes of the planes ``[..., 4]`` of elements, 16 bits in int32: the inverse of :func:`gather_bits`."""
    planes = [((element >> SIGN_BIT[plane]) & 1) << 3 | (element >> MAGNITUDE_BIT[plane]) & 7 for plane in range(4)]
    return torch.stack(planes, dim=-1)


def pack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes 0..15, uint8 ``[..., K]`` with K a multiple of 16, as int16 ``[..., K / 4]``."""
    return as_int16(gather_bits(split_planes(codes)))


def unpack_e2m1(elements: torch.Tensor) -> torch.Tensor:
    """Return the codes :func:`pack_e2m1` packed, uint8 ``[..., K]``."""
    return join_planes(scatter_bits(elements.to(torch.int32) & 0xFFFF)).to(torch.uint8)
