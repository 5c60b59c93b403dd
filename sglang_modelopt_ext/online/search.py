"""The search for block scales under which a weight, as a kernel decodes it, has the least squared error."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_modelopt_ext.env import W4A8Math
from sglang_modelopt_kernels.formats.base import SearchedWeightFormat
from sglang_modelopt_kernels.formats.checks import split_blocks
from sglang_modelopt_kernels.formats.nvfp4 import round_unit_to_e4m3


@dataclass(frozen=True)
class Rounded:
    """Some rows of a weight as they are stored.

    Attributes:
        tensors: by the names of the format's tensors.
        error: sum of squared differences from the weight.
        max_error: that sum under the scales of a max calibration.
    """

    tensors: dict[str, torch.Tensor]
    error: float
    max_error: float


def round_rows(
    number_format: SearchedWeightFormat,
    rows: torch.Tensor,
    amax: torch.Tensor | None = None,
    *,
    search: bool = True,
    math: W4A8Math = "exact",
) -> Rounded:
    """Round rows of a weight under the best of a max calibration's block scales and their neighbours.

    A neighbour is taken where it has strictly less error. All steps are single float64 operations on entries, added in one fixed
    order, so that every device chooses alike.

    Args:
        number_format: how they are stored.
        rows: finite, ``[N, K]``, K a multiple of the block.
        amax: see :meth:`~sglang_modelopt_kernels.formats.base.SearchedWeightFormat.scales`.
        search: whether to try the neighbours.
        math: ``fp8`` where kernels round code * block scale to E4M3.

    Raises:
        ValueError: there are no scales.
    """
    scales = number_format.scales(rows, amax)
    tensors = number_format.encode(rows, scales)
    best = block_errors(number_format, rows, tensors, math)
    max_error = float(best.sum())
    block_scale = tensors["weight_scale"]
    for candidate in number_format.candidates(block_scale) if search else ():
        other = number_format.encode(rows, {**scales, "weight_scale": candidate})
        errors = block_errors(number_format, rows, other, math)
        better = errors < best
        best = torch.where(better, errors, best)
        for name in ("weight", "weight_scale"):
            tensors[name] = _choose(better, other[name], tensors[name])
    return Rounded(tensors, float(best.sum()), max_error)


def block_errors(
    number_format: SearchedWeightFormat, rows: torch.Tensor, tensors: dict[str, torch.Tensor], math: W4A8Math = "exact"
) -> torch.Tensor:
    """Return the squared error of each block of ``rows`` as kernels decode ``tensors``: float64 ``[N, K / block]``."""
    decoded = number_format.decode(tensors)
    if math == "fp8":
        decoded = round_unit_to_e4m3(decoded)
    difference = decoded.unit.to(torch.float64).mul_(decoded.out_scale.to(torch.float64)).sub_(rows)
    squares = split_blocks(difference.square_(), number_format.group_size)
    while squares.shape[-1] > 1:  # in halves: a sum of torch's own has another order on another device
        half = squares.shape[-1] // 2
        squares = squares[..., :half] + squares[..., half:]
    return squares.squeeze(-1)


def _choose(where: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the blocks of ``first`` where ``where`` ``[N, blocks]``, else of ``second``; of one byte an entry."""
    one, other = (split_blocks(part.view(torch.uint8), part.shape[-1] // where.shape[-1]) for part in (first, second))
    return torch.where(where.unsqueeze(-1), one, other).flatten(-2).view(second.dtype)
