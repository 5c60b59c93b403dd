"""E4M3 (``torch.float8_e4m3fn``): weights, activations and NVFP4 block scales.

Four exponent bits of bias 7, three mantissa bits, no infinity; 0x7F and 0xFF are the only NaN (OCP OFP8 v1.0).
Magnitudes reach 448, the smallest normal is 2^-6 and the smallest subnormal 2^-9.
"""

from __future__ import annotations

import torch

MAX = 448.0
"""The largest finite magnitude."""

SMALLEST_NORMAL = 2.0**-6
SMALLEST_SUBNORMAL = 2.0**-9


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to ``float8_e4m3fn``, nearest even, saturating at +-448; infinity saturates too, NaN stays NaN.

    Hardware conversions saturate; PyTorch's cast makes NaN of what is above 464 in some versions, hence the clamp.
    """
    return x.clamp(-MAX, MAX).to(torch.float8_e4m3fn)


def round_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Return the float32 values that :func:`to_e4m3` rounds float32 ``x`` to."""
    return to_e4m3(x).to(torch.float32)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Decode bytes (uint8 or ``float8_e4m3fn``) to their values in float32, shape unchanged. NaN bytes give NaN."""
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


def byte_is_nan(codes: torch.Tensor) -> torch.Tensor:
    """Return where a byte (uint8 or ``float8_e4m3fn``) is NaN: bool, shape unchanged."""
    return (codes.view(torch.uint8) & 0x7F) == 0x7F


def byte_is_negative(codes: torch.Tensor) -> torch.Tensor:
    """Return where a byte (uint8 or ``float8_e4m3fn``) is below zero: bool, shape unchanged. Minus zero and NaN are not."""
    raw = codes.view(torch.uint8)
    return (raw > 0x80) & (raw < 0xFF)
