"""E2M1, the 4-bit float of NVFP4 and MXFP4: two exponent bits, one mantissa bit, no NaN and no infinity.

A code is ``sign << 3 | magnitude``; the eight magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4 and 6 (OCP MX v1.0, 5.3.3). A byte
holds two codes along K, the even k in the low nibble (ModelOpt 0.47, ``NVFP4QTensor.quantize`` and
``MXFP4QTensor.quantize``).
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

MAX = 6.0
"""The largest magnitude."""

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each code."""

MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Between magnitude i and magnitude i + 1: where rounding has to break a tie."""

Ties = Literal["even", "down"]


@cache
def _constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # Made once for each device, because a copy to a GPU breaks CUDA graph capture; and outside inference mode, because
    # an inference tensor that outlives its context cannot be used outside of it.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Packed uint8 ``[..., K / 2]`` to one code in each uint8 of ``[..., K]``."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes 0..15, uint8 ``[..., K]``, to uint8 ``[..., K / 2]``. Raises ValueError when K is odd."""
    if codes.shape[-1] % 2:
        raise ValueError(f"K = {codes.shape[-1]} is odd: two codes share a byte")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Decode codes 0..15, uint8, to their values in float32, shape unchanged. Code 8 is -0.0."""
    return _constant(VALUES, codes.device)[codes.to(torch.int32)]


def encode(x: torch.Tensor, ties: Ties = "even") -> torch.Tensor:
    """Round ``x`` to the nearest E2M1 value: float32 to uint8 codes 0..15, shape unchanged.

    Magnitudes above 6 saturate, infinity included. E2M1 has no NaN: the code of a NaN is 7 or 15 and means nothing; a
    caller that may see one carries it in the block scale.

    Args:
        x: float32, already divided by its scales.
        ties: ``"even"`` breaks a tie towards the even code and gives both zeros code 0; this is
            ``NVFP4QTensor._cast_fp4`` of ModelOpt 0.47 and the ``cvt.rn`` of the hardware. ``"down"`` breaks it towards
            zero and gives both zeros code 8, minus zero: ``cast_fp4`` in ``MXFP4QTensor.quantize``, whose sign bit is
            ``(2 - sign(x)) // 2``. A nonzero ``x`` that rounds to zero keeps its sign under both.
    """
    magnitude = x.abs()
    # bucketize counts the midpoints strictly below: every tie goes down.
    code = torch.bucketize(magnitude, _constant(MIDPOINTS, x.device), out_int32=True).to(torch.uint8)
    if ties == "down":
        return code | ((~(x > 0)).to(torch.uint8) << 3)
    # The three midpoints whose lower neighbour has an odd code.
    up = (magnitude == MIDPOINTS[1]) | (magnitude == MIDPOINTS[3]) | (magnitude == MIDPOINTS[5])
    return (code + up.to(torch.uint8)) | ((x < 0).to(torch.uint8) << 3)
