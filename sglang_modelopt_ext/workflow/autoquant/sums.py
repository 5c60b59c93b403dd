"""ModelOpt's sums of scores, by format and module: read from a searched model, put back, and added up over windows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

Sums = Mapping[str, Mapping[str, float]]
"""Sums by format and module; of a module that no token reached there is none."""


def hparams(model: Any) -> list[tuple[str, Any]]:
    """Return ModelOpt's searched groups of layers with their names."""
    from modelopt.torch.opt.utils import named_hparams
    from modelopt.torch.quantization.algorithms import QuantRecipeHparam

    return [
        (name, hparam) for name, hparam in named_hparams(model, unique=True) if isinstance(hparam, QuantRecipeHparam)
    ]


def read_sums(model: Any, recipes: Mapping[Any, str]) -> dict[str, dict[str, float]]:
    """Return ModelOpt's sums; ``recipes`` has the name of each format."""
    names = {module: name for name, module in model.named_modules()}
    sums: dict[str, dict[str, float]] = {}
    for _, hparam in hparams(model):
        for recipe, modules in hparam._importance_dict.items():
            for module, value in modules.items():
                if value is not None:
                    sums.setdefault(recipes[recipe], {})[names[module]] = float(value)
    return sums


def restore_sums(model: Any, recipes: Mapping[Any, str], sums: Sums) -> None:
    """Put sums back into ModelOpt; those that are not in ``sums`` start anew."""
    names = {module: name for name, module in model.named_modules()}
    device = next(model.parameters()).device
    for _, hparam in hparams(model):
        for recipe, modules in hparam._importance_dict.items():
            for module in modules:
                value = sums.get(recipes[recipe], {}).get(names[module])
                modules[module] = None if value is None else torch.tensor(value, dtype=torch.float32, device=device)


def added(sums: Sums, windows: Iterable[Sums]) -> dict[str, dict[str, float]]:
    """Return ``sums`` with those of some windows added, one window after the other and in float32, as ModelOpt adds them."""
    total = {name: dict(row) for name, row in sums.items()}
    for window in windows:
        for name, row in window.items():
            own = total.setdefault(name, {})
            for module, value in row.items():
                own[module] = float(np.float32(own[module]) + np.float32(value)) if module in own else value
    return total
