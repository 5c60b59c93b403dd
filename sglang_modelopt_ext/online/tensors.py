"""The tensors of a quantized checkpoint, made of those of an unquantized one: read, rounded and written in parts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.tensors import StoredTensor, open_safetensors, read_headers
from sglang_modelopt_ext.checkpoint.values import check_values
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.online.recipe import Recipe
from sglang_modelopt_ext.online.search import round_rows
from sglang_modelopt_ext.online.shards import Shards
from sglang_modelopt_kernels.formats.base import ValueRule
from sglang_modelopt_kernels.formats.checks import check_weight

ENTRIES = 1 << 22
"""Weights that are rounded at a time, in float64."""
GPU_ENTRIES = 1 << 24
"""Weights that a GPU rounds at a time, in float64: 128 MiB for each array of them."""

_SHARING = (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"}), frozenset({"w1", "w3"}))
"""Projections of one module that ModelOpt gives one global scale."""


def write_tensors(
    source: Path, modules: Collection[str], recipe: Recipe, folder: Path, device: str = "cpu"
) -> tuple[float, float]:
    """Write all tensors of the checkpoint in ``source`` to ``folder``, those of ``modules`` quantized.

    Args:
        source: a folder with safetensors files.
        modules: the linear layers to quantize.
        recipe: how.
        folder: receives the files.
        device: where weights are rounded, to the same bits on every one.

    Returns:
        The sum of squared weight errors, and that of a max calibration.

    Raises:
        ModelOptExtError: a weight or an input scale that cannot be stored, or no room on the disk.
    """
    stored, chosen = read_headers(source), frozenset(modules)
    scales = input_scales(recipe, chosen)
    shards, error, max_error = Shards(folder), 0.0, 0.0
    amax = _shared_amax(stored, chosen, device) if recipe.weight.output_scale is not None else {}
    for file in sorted({tensor.file for tensor in stored.values()}):
        with open_safetensors(file) as handle:
            for name in sorted(tensor.name for tensor in stored.values() if tensor.file == file):
                module, _, last = name.rpartition(".")
                if last != "weight" or module not in chosen:
                    shards.add(name, handle.get_tensor(name))
                    continue
                tensors, found = _layer(stored[name], handle, recipe, amax.get(module), device)
                error, max_error = error + found[0], max_error + found[1]
                for part, tensor in tensors.items():
                    shards.add(f"{module}.{part}", tensor)
                if module in scales:
                    shards.add(f"{module}.input_scale", scales[module])
    shards.close()
    return error, max_error


def _layer(
    tensor: StoredTensor, handle: Any, recipe: Recipe, amax: torch.Tensor | None, device: str
) -> tuple[dict[str, torch.Tensor], tuple[float, float]]:
    """Return the stored tensors of one layer, with its squared error and that of a max calibration."""
    parts, error, max_error = [], 0.0, 0.0
    for rows in _rows(tensor, handle, recipe.weight.group_size, device):
        try:
            rounded = round_rows(recipe.weight, rows, amax, search=recipe.search, math=recipe.math)
        except ValueError as problem:
            raise ModelOptExtError.at(tensor.file, tensor.name, f"a weight for {recipe.algo}", problem) from problem
        parts.append({name: part.cpu() for name, part in rounded.tensors.items()})
        error, max_error = error + rounded.error, max_error + rounded.max_error
    scalars = {spec.name for spec in recipe.weight.tensors if spec.is_scalar}
    tensors = {
        name: first if name in scalars else torch.cat([part[name] for part in parts])
        for name, first in parts[0].items()
    }
    return tensors, (error, max_error)


def _rows(tensor: StoredTensor, handle: Any, block: int, device: str) -> Iterator[torch.Tensor]:
    """Yield the rows of a weight in parts, on ``device``. Raises ModelOptExtError for NaN and infinity."""
    data, count = handle.get_slice(tensor.name), tensor.shape[0]
    step = max(1, (ENTRIES if device == "cpu" else GPU_ENTRIES) // tensor.shape[1])
    for start in range(0, count, step):
        rows = data[start : min(start + step, count)].to(device)
        try:
            check_weight(rows, block)
        except ValueError as problem:
            raise ModelOptExtError.at(tensor.file, tensor.name, "finite weights", problem) from problem
        yield rows


def _shared_amax(stored: Mapping[str, StoredTensor], modules: frozenset[str], device: str) -> dict[str, torch.Tensor]:
    """Return the largest magnitude of each module and those that share a global scale with it, float32 ``[]``."""
    own: dict[str, torch.Tensor] = {}
    for file in sorted({stored[f"{module}.weight"].file for module in modules}):
        with open_safetensors(file) as handle:
            for module in sorted(modules):
                tensor = stored[f"{module}.weight"]
                if tensor.file == file:
                    own[module] = (
                        torch.stack([rows.abs().amax() for rows in _rows(tensor, handle, 1, device)]).amax().float()
                    )
    return {module: torch.stack([own[other] for other in _sharing(module, modules)]).amax() for module in modules}


def _sharing(module: str, modules: frozenset[str]) -> list[str]:
    """Return ``module`` and the others that share a global scale with it."""
    parent, _, last = module.rpartition(".")
    names = next((names for names in _SHARING if last in names), frozenset({last}))
    return [other for name in sorted(names) if (other := f"{parent}.{name}") in modules]


def scale_files(given: Path) -> list[Path]:
    """Return the safetensors files with input scales. Raises ModelOptExtError where there are none."""
    files = sorted(given.glob("*.safetensors")) if given.is_dir() else [given] if given.is_file() else []
    if not files:
        raise ModelOptExtError.at(given, "input scales", "a safetensors file, or a folder of them", "none")
    return files


def input_scales(recipe: Recipe, modules: Collection[str]) -> dict[str, torch.Tensor]:
    """Return the given ``input_scale`` of each module, float32 ``[]``. Raises ModelOptExtError for a missing or illegal one."""
    if recipe.input_scales is None:
        return {}
    found: dict[str, torch.Tensor] = {}
    for file in scale_files(recipe.input_scales):
        with open_safetensors(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                module, _, last = name.rpartition(".")
                if last == "input_scale":
                    found[module] = handle.get_tensor(name).to(torch.float32)
    for module in modules:
        name = f"{module}.input_scale"
        if module not in found or found[module].numel() != 1:
            raise ModelOptExtError.at(
                recipe.input_scales, name, "one scale", "none" if module not in found else "several"
            )
        check_values(recipe.input_scales, name, found[module], ValueRule.POSITIVE)
    return {module: found[module].reshape(()) for module in modules}
