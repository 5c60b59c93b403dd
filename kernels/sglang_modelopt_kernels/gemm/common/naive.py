"""Naive twins of the epilogue and of the sum of split-K partials, in float64 and in the order of the formula."""

from __future__ import annotations

import torch

from .epilogue import Epilogue


def naive_epilogue(
    product: torch.Tensor,
    row_scale: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply a product's scales and bias: ``product * out_scale * row_scale + bias``, float64 ``[M, N]``.

    Args:
        product: float64 ``[M, N]``.
        row_scale: one value or ``[M, 1]``; None for 1.
        out_scale: ``[N]``; None for 1.
        bias: ``[N]`` or None.
    """
    y = product if out_scale is None else product * out_scale.to(torch.float64)
    if row_scale is not None:
        y = y * row_scale.to(torch.float64)
    return y if bias is None else y + bias.to(torch.float64)


def naive_finish(partials: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """Sum split-K partials ``[splits, M, N]`` and apply ``epilogue``: float64 ``[M, N]``, see :meth:`Epilogue.finish`."""
    total = partials.to(torch.float64).sum(dim=0) * epilogue.descale
    return naive_epilogue(total, epilogue.row_scale, epilogue.out_scale, epilogue.bias)
