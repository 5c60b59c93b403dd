"""The device that is to serve a checkpoint: this machine's, or a named one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sglang_modelopt_ext.checkpoint.ownership import gpu_capability
from sglang_modelopt_ext.errors import ModelOptExtError

CAPABILITIES = (80, 86, 87, 89, 90, 100, 103, 120, 121)
"""Compute capabilities of existing GPUs, times ten, from SM80 on."""


@dataclass(frozen=True)
class Target:
    """A device that serves.

    Attributes:
        capability: the GPU's compute capability times ten, None for a CPU.
    """

    capability: int | None

    @property
    def device(self) -> str:
        """Return ``cpu`` or ``cuda``."""
        return "cpu" if self.capability is None else "cuda"

    @property
    def name(self) -> str:
        """Return ``cpu``, or a name such as ``sm90``."""
        return "cpu" if self.capability is None else f"sm{self.capability}"


def find_target(name: str | None) -> Target:
    """Return the device of a name (``cpu``, ``sm90``, ``SM90``, ``90``); this machine's for None.

    Raises:
        ModelOptExtError: an unknown GPU, or one before SM80, which this package does not support.
    """
    if name is None:
        return Target(gpu_capability())
    if name.lower() == "cpu":
        return Target(None)
    found = re.fullmatch(r"(?:sm_?)?(\d+)a?", name.lower())
    if found is None or int(found.group(1)) not in CAPABILITIES:
        known = ", ".join(f"sm{capability}" for capability in CAPABILITIES)
        raise ModelOptExtError.at("command line", "--gpu", f"cpu or one of {known}", name)
    return Target(int(found.group(1)))
