"""Packing for the block-scaled kernel: codes in 16-bit elements of four planes, block scales as one byte or one float32.

The planes are those of :mod:`sglang_modelopt_kernels.formats.fp4_packing`; INT4 codes + 8 take four bits in order of the planes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch

from sglang_modelopt_kernels.formats import e2m1, e4m3, ue8m0
from sglang_modelopt_kernels.formats.base import BlockWeight, NumberType
from sglang_modelopt_kernels.formats.checks import check_tensor, scale_blocks, split_blocks
from sglang_modelopt_kernels.formats.fp4_packing.packing import (
    as_int16,
    join_planes,
    pack_e2m1,
    split_planes,
    unpack_e2m1,
)
from sglang_modelopt_kernels.formats.int4_awq import INT4
from sglang_modelopt_kernels.formats.mxfp4 import MXFP4
from sglang_modelopt_kernels.formats.nvfp4 import NVFP4, NVFP4_BLOCK32

Kind = Literal["e2m1_e4m3", "e2m1_exponent", "int4_float"]
"""How codes and block scales are read."""

KIND_OF: dict[NumberType, Kind] = {
    NVFP4: "e2m1_e4m3",
    NVFP4_BLOCK32: "e2m1_e4m3",
    MXFP4: "e2m1_exponent",
    INT4: "int4_float",
}
"""The number types that can be packed. Four codes of an element share a scale, so that blocks have at least 16 entries."""

EXPONENT_TOP = 30
EXPONENT_BOTTOM = 6
"""Range of a stored exponent ``b``, which stands for ``2^(b - 15)``: float16's largest, and the least for which half of it, as the
kernel multiplies it (times 2^-14), is still a float16."""
PACK_ENTRIES = 1 << 24
"""At most this many codes are packed at a time."""
EXPONENT_FP8 = 16
"""From here the weight divided by 2^9 is E2M1 times 2^-8 to 2^6, which E4M3 holds exactly."""


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight: ``W = code * block scale * out_scale``.

    Attributes:
        codes: int16 ``[N, K / 4]``.
        scale: ``[N, K / group]``: uint8 (e4m3 bits, or ``b`` of ``2^(b - 15)``) or float32.
        out_scale: float32 ``[N]``.
        kind: how codes and scales are read.
        group: inputs to a block scale.
        fp8: whether the weight is E4M3 values under a scale for each row: no exponent of a block that is not zero is more than
            14 below its row's largest.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    out_scale: torch.Tensor
    kind: Kind
    group: int
    fp8: bool = False

    @property
    def n(self) -> int:
        """Output features."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Input features."""
        return self.codes.shape[1] * 4


def pack(weight: BlockWeight) -> PackedWeight:
    """Pack a weight for the kernel, exactly.

    Raises:
        ValueError: K is not a multiple of 16, the number type is none of :data:`KIND_OF`, the scales have another shape, an E4M3
            scale is NaN or negative or a UE8M0 scale is NaN (the kernel reads their bits), or the exponents of a row's blocks span
            more than the kernel's range.
    """
    n, k = weight.codes.shape
    if k % 16:
        raise ValueError(f"K = {k} is not a multiple of 16")
    kind = KIND_OF.get(weight.number_type)
    if kind is None:
        raise ValueError(f"packing: expected {' or '.join(map(str, KIND_OF))}, got {weight.number_type}")
    check_tensor("block scales", weight.scale, weight.scale.dtype, (n, k // weight.group))
    out_scale = weight.out_scale.to(torch.float32).reshape(-1).expand(n).contiguous()
    if kind == "int4_float":
        return PackedWeight(
            _by_rows(weight.codes, _pack_int4), weight.scale.contiguous(), out_scale, kind, weight.group
        )
    codes = _by_rows(weight.codes, pack_e2m1)
    if kind == "e2m1_e4m3":
        if bool((e4m3.byte_is_nan(weight.scale) | e4m3.byte_is_negative(weight.scale)).any()):
            raise ValueError("an E4M3 block scale is NaN or negative")
        return PackedWeight(codes, weight.scale.view(torch.uint8).contiguous(), out_scale, kind, weight.group)
    scale, factor, fp8 = _relative_exponents(weight)
    return PackedWeight(codes, scale, out_scale * factor, kind, weight.group, fp8)


def check_kind(kind: str) -> Kind:
    """Narrow a kind that came through an operator as a string. Raises ValueError for an unknown one."""
    known = next((one for one in get_args(Kind) if one == kind), None)
    if known is None:
        raise ValueError(f"unknown kind of packed weight: {kind!r}")
    return cast(Kind, known)


def unpack(packed: PackedWeight) -> torch.Tensor:
    """Return the weight without its ``out_scale``, float64 ``[N, K]``: the naive reading of what the kernel reads."""
    if packed.kind == "int4_float":
        element = packed.codes.to(torch.int32) & 0xFFFF
        values = join_planes(torch.stack([(element >> 4 * plane & 15) - 8 for plane in range(4)], dim=-1)).to(
            torch.float64
        )
    else:
        values = e2m1.decode(unpack_e2m1(packed.codes)).to(torch.float64)
    if packed.kind == "e2m1_e4m3":
        scale = e4m3.decode(packed.scale.view(torch.float8_e4m3fn)).to(torch.float64)
    elif packed.kind == "e2m1_exponent":
        scale = torch.exp2(packed.scale.to(torch.float64) - 15)
    else:
        scale = packed.scale.to(torch.float64)
    return scale_blocks(values, scale)


def _by_rows(codes: torch.Tensor, pack_rows: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply ``pack_rows`` to parts of the rows: its integers take 30 times the memory of the result."""
    return torch.cat([pack_rows(part) for part in codes.split(max(PACK_ENTRIES // codes.shape[1], 1))])


def _pack_int4(codes: torch.Tensor) -> torch.Tensor:
    planes = split_planes(codes) + 8
    element = torch.zeros_like(planes[..., 0])
    for plane in range(4):
        element |= planes[..., plane] << (4 * plane)
    return as_int16(element)


def _relative_exponents(weight: BlockWeight) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return stored exponents uint8 ``[N, K / group]``, the factor of each row, float32 ``[N]``, and :attr:`PackedWeight.fp8`.

    A zero block has no exponent.
    """
    if bool(ue8m0.byte_is_nan(weight.scale).any()):
        raise ValueError("a UE8M0 block scale is NaN")
    zero = (split_blocks(weight.codes, weight.group) & 7).amax(dim=2) == 0
    exponent = weight.scale.to(torch.int32)
    top = torch.where(zero, 0, exponent).amax(dim=1, keepdim=True)
    stored = torch.where(zero, EXPONENT_BOTTOM, exponent - top + EXPONENT_TOP)
    if bool((stored < EXPONENT_BOTTOM).any()):
        span = int((top - torch.where(zero, top, exponent)).amax())
        raise ValueError(f"block scales of one row span 2^{span}, more than 2^{EXPONENT_TOP - EXPONENT_BOTTOM}")
    factor = torch.exp2((top - ue8m0.BIAS - (EXPONENT_TOP - 15)).to(torch.float64)).to(torch.float32)
    if bool((factor == 0).any() | torch.isinf(factor).any()):
        raise ValueError("the largest block scale of a row is at the end of float32's range")
    fp8 = not bool(((stored < EXPONENT_FP8) & ~zero).any())
    return stored.to(torch.uint8), factor.reshape(-1), fp8
