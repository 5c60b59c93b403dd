"""Number formats: codes, what a checkpoint stores for them, how that is decoded and how a reference quantizer makes it.

A new format is one class and one :func:`register` below; the tests in ``tests/kernels`` then cover it by default.
"""

from __future__ import annotations

from .base import ActivationFormat, WeightFormat
from .fp8 import FP8BlockWeight, FP8DynamicPerToken, FP8PerChannelWeight, FP8PerTensorWeight, FP8StaticPerTensor
from .int4_awq import INT4Weight, INT4WeightUnderFP8
from .int8 import INT8PerChannelWeight, INT8StaticPerTensor
from .mxfp4 import MXFP4Dynamic, MXFP4Weight
from .mxfp8 import MXFP8Dynamic, MXFP8Weight
from .nvfp4 import FP8_RANGE, FULL_RANGE, NVFP4DynamicBlock, NVFP4Weight

__all__ = ["ACTIVATION_FORMATS", "WEIGHT_FORMATS", "register"]

WEIGHT_FORMATS: dict[str, WeightFormat] = {}
"""Weight formats by name."""

ACTIVATION_FORMATS: dict[str, ActivationFormat] = {}
"""Activation formats by name."""


def register(number_format: WeightFormat | ActivationFormat) -> None:
    """Add a format to its registry. Raises ValueError when the name is taken."""
    taken = WEIGHT_FORMATS if isinstance(number_format, WeightFormat) else ACTIVATION_FORMATS
    if number_format.name in taken:
        raise ValueError(f"{number_format.name!r} is already registered")
    if isinstance(number_format, WeightFormat):
        WEIGHT_FORMATS[number_format.name] = number_format
    else:
        ACTIVATION_FORMATS[number_format.name] = number_format


register(NVFP4Weight("nvfp4", 16, FULL_RANGE))
register(NVFP4Weight("nvfp4_bs32", 32, FULL_RANGE))  # NVFP4_MLP_WEIGHT_ONLY
register(NVFP4Weight("nvfp4_w4a8", 32, FP8_RANGE))  # W4A8_NVFP4_FP8
register(MXFP4Weight())
register(MXFP8Weight())
register(FP8PerTensorWeight())
register(FP8PerChannelWeight())
register(FP8BlockWeight())
register(INT8PerChannelWeight())
register(INT4Weight())
register(INT4WeightUnderFP8())

register(NVFP4DynamicBlock())
register(MXFP4Dynamic())
register(MXFP8Dynamic())
register(FP8StaticPerTensor())
register(FP8DynamicPerToken())
register(INT8StaticPerTensor())
