"""The machine at hand: its hardware and versions, and calls that leave its GPU as it was."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

from sglang_modelopt_ext._version import __version__

PACKAGES = ("sglang", "torch", "triton", "sglang-kernel", "flashinfer-python")
Returned = TypeVar("Returned")


def has_gpu() -> bool:
    """Return whether there is a GPU, and leave it alone."""
    return torch.cuda.is_available()


def hardware() -> str:
    """Return the name of the GPU, or of the CPU where there is none."""
    return torch.cuda.get_device_name() if has_gpu() else f"CPU ({platform.machine()})"


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter and are installed."""
    found = {"python": platform.python_version(), "sglang-modelopt-ext": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def apart(function: Callable[..., Returned], *arguments: object) -> Returned:
    """Call a function in a process of its own, which leaves nothing on the GPU where servers will look for memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
