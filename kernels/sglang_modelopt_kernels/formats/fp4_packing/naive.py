"""Naive twin of the decoding of planes: the packed codes read back by :func:`unpack_e2m1`."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.formats import e2m1

from .packing import split_planes, unpack_e2m1


def naive_planes(elements: torch.Tensor) -> torch.Tensor:
    """Decode packed elements, int16 ``[..., K / 4]``, to the E2M1 values of their planes, float64 ``[..., K / 4, 4]``."""
    return e2m1.decode(split_planes(unpack_e2m1(elements)).to(torch.uint8)).to(torch.float64)
