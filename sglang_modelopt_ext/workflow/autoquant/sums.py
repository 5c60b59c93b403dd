"""ModelOpt's sums of scores, by format and module: read from a searched model, put back, and added up over windows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from sglang_modelopt_ext.workflow.autoquant.solve import Method

Sums = Mapping[str, Mapping[str, float]]
"""Sums by format and module; of a module that no token reached there is none."""


def hparams(model: Any) -> list[tuple[str, Any]]:
    """Return ModelOpt's searched groups of layers with their names."""
    from modelopt.torch.opt.utils import named_hparams
    from modelopt.torch.quantization.algorithms import QuantRecipeHparam

    return [
        (name, hparam) for name, hparam in named_hparams(model, unique=True) if isinstance(hparam, QuantRecipeHparam)
    ]


def read_sums(model: Any, recipes: Mapping[Any, str], method: Method) -> dict[str, dict[str, float]]:
    """Return ModelOpt's sums; ``recipes`` has the name of each format."""
    names = {module: name for name, module in model.named_modules()}
    sums: dict[str, dict[str, float]] = {}
    for _, hparam in hparams(model):
        places = _places(hparam, names, method)
        for recipe, modules in hparam._importance_dict.items():
            for module, name in places.items():
                if modules[module] is not None:
                    sums.setdefault(recipes[recipe], {})[name] = float(modules[module])
    return sums


def restore_sums(model: Any, recipes: Mapping[Any, str], method: Method, sums: Sums) -> None:
    """Put sums back into ModelOpt; those that are not in ``sums`` start anew."""
    names = {module: name for name, module in model.named_modules()}
    device = next(model.parameters()).device
    for _, hparam in hparams(model):
        places = _places(hparam, names, method)
        for recipe, modules in hparam._importance_dict.items():
            for module in modules:
                value = sums.get(recipes[recipe], {}).get(places.get(module, ""))
                modules[module] = None if value is None else torch.tensor(value, dtype=torch.float32, device=device)


def _places(hparam: Any, names: Mapping[Any, str], method: Method) -> dict[Any, str]:
    """Return the modules of a group where ModelOpt keeps sums, with their names here.

    A divergence is of the whole group. ModelOpt keeps it at one module, which is another one in every process: it comes from a set.
    """
    if method == "gradient":
        return {module: names[module] for module in hparam.score_modules}
    return {hparam.score_modules[0]: min(names[module] for module in hparam.score_modules)}


def added(sums: Sums, windows: Iterable[Sums]) -> dict[str, dict[str, float]]:
    """Return ``sums`` with those of some windows added, one window after the other and in float32, as ModelOpt adds them."""
    total = {name: dict(row) for name, row in sums.items()}
    for window in windows:
        for name, row in window.items():
            own = total.setdefault(name, {})
            for module, value in row.items():
                own[module] = float(np.float32(own[module]) + np.float32(value)) if module in own else value
    return total
