"""The speed of recipes in a server, as it was measured, and what of it holds for the GPU at hand.

``docs/choosing.md`` has the same figures with their sources; a test compares both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

BASE = "FP8"
"""The recipe that the others are relative to, as SGLang serves it."""

LOADS = {
    "1 request": "decoding 1 request",
    "16": "decoding 16",
    "64": "decoding 64",
    "first token of 1024": "the first token of 1024",
    "of 8192": "the first token of 8192",
}
"""Loads by their heading in the documentation, with what they are called in a line of text."""


@dataclass(frozen=True)
class Measured:
    """One run of servers.

    Attributes:
        gpu: its name.
        capability: its compute capability times ten.
        model: the sizes of the model.
        date: of the run.
        speeds: by recipe and load, the speed relative to :data:`BASE`, above 1 faster.
    """

    gpu: str
    capability: int
    model: str
    date: str
    speeds: Mapping[str, Mapping[str, float]]

    def fastest(self, load: str) -> tuple[str, float]:
        """Return the fastest recipe for a load, and how much faster than :data:`BASE` it is."""
        best = max(self.speeds, key=lambda recipe: self.speeds[recipe][load])
        return (best, self.speeds[best][load]) if self.speeds[best][load] > 1 else (BASE, 1.0)


def _speeds(*values: float) -> dict[str, float]:
    return dict(zip(LOADS, values, strict=True))


MEASURED = (
    Measured(
        "NVIDIA H200",
        90,
        "8B",
        "2026-12-01",
        {
            "W4A8_MXFP4_FP8": _speeds(1.34, 1.18, 1.12, 1.0, 1 / 1.06),
            "W4A8_NVFP4_FP8": _speeds(1.23, 1.08, 0.92, 1 / 1.49, 1 / 1.61),
        },
    ),
)


def advice(capability: int) -> str:
    """Return a line about the fastest recipe for each load on GPUs of a compute capability (times ten)."""
    run = next((run for run in MEASURED if run.capability == capability), None)
    if run is None:
        return (
            f"no recipe was measured in a server on SM{capability}: `sglang-modelopt bench` compares them on this GPU"
        )
    parts = []
    for load, described in LOADS.items():
        recipe, speed = run.fastest(load)
        parts.append(f"{described} {recipe}" + (f" ({speed:.2f} of {BASE}'s speed)" if recipe != BASE else ""))
    return f"fastest on an {run.gpu} ({run.model}, {run.date}): {'; '.join(parts)}; `sglang-modelopt bench` measures this GPU"


def advice_here() -> str | None:
    """Return the line for the GPU at hand, None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return advice(10 * major + minor)
