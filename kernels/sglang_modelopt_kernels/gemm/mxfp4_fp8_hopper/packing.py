"""Packing for the folded kernel, exactly the stored weight: E2M1 times 2^(e - 6) is an E4M3 number for exponents e from 1 to 12.

Sixteen bytes hold a block of 32 inputs, in words of four bytes. Word q holds inputs 4 q + i and 16 + 4 q + i for i = 0..3: their
magnitudes in nibbles i and 4 + i, where ``prmt`` takes them as selectors of a table of eight values; their signs at bits 8 i + 3
and 8 i + 7, which are the free bits of the nibbles, one shift from where E4M3 has its sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_modelopt_kernels.formats import e2m1, ue8m0
from sglang_modelopt_kernels.formats.checks import check_mxfp4

BLOCK = 32
TOP, BOTTOM = 12, 1
"""Range of a folded exponent: 6 * 2^6 is below E4M3's largest number, and half of 2^-5 its smallest that is not subnormal."""


@dataclass(frozen=True)
class FoldedWeight:
    """A packed weight: ``W = code * 2^(exponent - 6) * out_scale``.

    Attributes:
        codes: uint8 ``[N, K / 2]``.
        exponent: uint8 ``[N, K / 32]``, 1 to 12.
        out_scale: float32 ``[N]``.
    """

    codes: torch.Tensor
    exponent: torch.Tensor
    out_scale: torch.Tensor

    @property
    def n(self) -> int:
        """Output features."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Input features."""
        return 2 * self.codes.shape[1]


def fold(codes: torch.Tensor, scale: torch.Tensor) -> FoldedWeight:
    """Pack a stored MXFP4 weight, ``codes`` uint8 ``[N, K / 2]`` and ``scale`` uint8 ``[N, K / 32]``, exactly.

    A block of zeros has no exponent of its own.

    Raises:
        ValueError: codes or scales of another dtype, scales of other blocks, a scale that is NaN, or scales of a row that span
            more than 2^11.
    """
    check_mxfp4(codes, scale)
    if bool(ue8m0.byte_is_nan(scale).any()):
        raise ValueError("a UE8M0 block scale is NaN")
    zero = ((codes & 0x77).unflatten(1, (-1, BLOCK // 2)).amax(dim=2)) == 0
    stored = scale.to(torch.int32)
    top = torch.where(zero, 0, stored).amax(dim=1, keepdim=True)
    exponent = torch.where(zero, BOTTOM, stored - top + TOP)
    if bool((exponent < BOTTOM).any()):
        span = int((top - torch.where(zero, top, stored)).amax())
        raise ValueError(f"block scales of one row span 2^{span}, more than 2^{TOP - BOTTOM}")
    out_scale = torch.exp2((top - ue8m0.BIAS - TOP + 6).to(torch.float64)).to(torch.float32).reshape(-1)
    return FoldedWeight(_pack_words(codes), exponent.to(torch.uint8), out_scale)


def _pack_words(codes: torch.Tensor) -> torch.Tensor:
    """Return stored codes ``[N, K / 2]`` in the order of the kernel, a block after the other."""
    first, second = codes.unflatten(1, (-1, 2, 4, 2)).unbind(
        2
    )  # [N, blocks, word, pair of inputs], inputs 0..15 and 16..31
    low = (torch.stack((first, second), dim=3) & 0x77).flatten(3)  # the magnitudes of a word lie as they are stored
    signs = [((half & 0x08) >> 3, (half & 0x80) >> 7) for half in (first, second)]
    of_byte = [torch.stack(sign, dim=-1).flatten(3) for sign in signs]  # [N, blocks, word, 4], one for each input
    return (low | of_byte[0] << 3 | of_byte[1] << 7).flatten(1)


def unfold(weight: FoldedWeight) -> torch.Tensor:
    """Return the weight without its ``out_scale``, float64 ``[N, K]``: the naive reading of what the kernel reads."""
    word = weight.codes.unflatten(1, (-1, 4, 4)).to(torch.int32)  # [N, blocks, word, byte]
    magnitude = torch.stack((word & 7, word >> 4 & 7), dim=-1).flatten(3)  # [N, blocks, word, nibble]
    sign = torch.cat((word >> 3 & 1, word >> 7), dim=3)
    codes = (sign << 3 | magnitude).to(torch.uint8).unflatten(3, (2, 4)).transpose(2, 3).flatten(1)
    values = e2m1.decode(codes).to(torch.float64).unflatten(1, (-1, BLOCK))
    return (values * torch.exp2(weight.exponent.to(torch.float64) - 6).unsqueeze(-1)).flatten(1)
