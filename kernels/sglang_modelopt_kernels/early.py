"""Kernels that begin before the kernels before them have ended: CUDA's programmatic dependent launch (PDL), of SM90 and later."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Wait for the kernels before this one, and let the next one begin.

    With PDL this kernel may have begun before they ended: until here it may read what no kernel writes, such as weights.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def early(device: torch.device) -> dict[str, Any]:
    """Return the arguments of a launch on ``device`` of a kernel that calls :func:`after_previous`."""
    return {"PDL": True, "launch_pdl": True} if _is_early(device) else {"PDL": False}


@functools.cache
def _is_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
