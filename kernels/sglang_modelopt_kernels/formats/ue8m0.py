"""UE8M0, the power-of-two block scale of the MX formats: byte ``e + 127`` for 2^e, 255 for NaN (OCP MX v1.0, 5.4.1)."""

from __future__ import annotations

import torch

from .checks import divide

BIAS = 127
NAN = 255
"""The one byte that is not a number."""


def decode(scale: torch.Tensor) -> torch.Tensor:
    """Decode bytes (uint8) to 2^(byte - 127) in float32, shape unchanged; 255 gives NaN.

    Built from bits and therefore exact, byte 0 included: 2^-127 is a subnormal of float32.
    """
    byte = scale.to(torch.int32)
    bits = torch.where(byte == 0, 1 << 22, byte << 23)
    bits = torch.where(byte == NAN, 0x7FC00000, bits)
    return bits.view(torch.float32)


def encode(exponent: torch.Tensor) -> torch.Tensor:
    """Encode integers in a float or int tensor as bytes (uint8), clamped to -127..127, shape unchanged."""
    return (exponent.clamp(-BIAS, BIAS) + BIAS).to(torch.uint8)


def byte_is_nan(scale: torch.Tensor) -> torch.Tensor:
    """Return where a byte (uint8) is NaN: bool, shape unchanged."""
    return scale == NAN


def weight_scale(amax: torch.Tensor, element_max: float) -> torch.Tensor:
    """Return the block scales a ModelOpt export stores: bytes of ``ceil(log2(amax / element_max))``, 0 for an all-zero block.

    The logarithm is taken in float32 as ModelOpt takes it, so a quotient a few millionths above a power of two may
    round down, and the largest elements of its block then saturate. A bf16 or fp16 weight has no such quotient.

    Source: ModelOpt 0.47, ``MXFP4QTensor.quantize`` and ``MXFP8QTensor._compute_e8m0_exponent``.

    Args:
        amax: float32 ``[...]``, finite: the largest magnitude of each block.
        element_max: the largest element, 6 for E2M1 and 448 for E4M3.
    """
    return encode(torch.ceil(torch.log2(divide(amax, element_max))))


def activation_scale(amax: torch.Tensor, element_max: float) -> torch.Tensor:
    """Return the block scales of a dynamic activation: bytes of ``ceil(log2(amax / element_max))``, the ceiling exact.

    A block that holds NaN or infinity gets the NaN scale. ModelOpt's simulation leaves such a block unscaled and
    saturates it, which hides the fault.

    Source: ModelOpt 0.47, ``compute_scale_e8m0_NV`` in ``tensor_quant_mx.cu``, which reads the exponent from the bits.
    """
    quotient = divide(amax, element_max)  # zero for an amax at the end of the subnormal numbers, too
    mantissa, exponent = torch.frexp(quotient)  # mantissa in [0.5, 1)
    ceiling = torch.where(mantissa == 0.5, exponent - 1, exponent)
    ceiling = torch.where(quotient == 0, -BIAS, ceiling)
    return torch.where(torch.isfinite(amax), encode(ceiling), NAN)
