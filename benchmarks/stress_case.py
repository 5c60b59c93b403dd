"""What one case of the stress run is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

TOLERANCE = 2.0**-8
"""Relative, of a row: twice the largest rounding of a bf16 result; the sums err far less. A race errs by more."""


@dataclass(frozen=True)
class Launch:
    """A kernel with its inputs on the GPU.

    Attributes:
        call: launches it and returns its output ``[rows, columns]``; the same inputs every time.
        expected: the result in float64; None where only repetition is checked, and another test has the numbers.
        tolerance: the largest error of a row, relative to its norm.
    """

    call: Callable[[], torch.Tensor]
    expected: torch.Tensor | None
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class StressCase:
    """A kernel in one configuration; ``build`` puts its inputs on the current GPU."""

    name: str
    build: Callable[[], Launch]
