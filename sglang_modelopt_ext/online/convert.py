"""The checkpoint that an unquantized one becomes: made once for each content and recipe, whole or not at all.

It has ModelOpt's own layout, so that everything that reads an export reads it. Weights are read, rounded and written in parts:
memory does not grow with the model, but for one layer and one file that waits to be written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_ext import __version__
from sglang_modelopt_ext.checkpoint.hub import CODE_FILES, HUB_FILES, hub_model
from sglang_modelopt_ext.checkpoint.quant_config import (
    CONFIG_NAME,
    OWN_KEY,
    QUANT_CONFIG_NAME,
    ROUNDS_ACTIVATIONS,
    WITHOUT_MODELOPT,
)
from sglang_modelopt_ext.checkpoint.tensors import (
    INDEX_NAME,
    StoredTensor,
    open_safetensors,
    read_headers,
    read_json_object,
)
from sglang_modelopt_ext.checkpoint.values import check_values
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.files.digest import file_digest, folder_digest
from sglang_modelopt_ext.files.whole import check_space, locked, make_readable, move_into_place, partial_folder
from sglang_modelopt_ext.online.recipe import Recipe
from sglang_modelopt_ext.online.search import round_rows
from sglang_modelopt_ext.online.selection import BY_DEFAULT, Selection, select
from sglang_modelopt_ext.online.shards import Shards
from sglang_modelopt_kernels.formats.base import ValueRule
from sglang_modelopt_kernels.formats.checks import check_weight

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the conversion: another one makes other checkpoints of the same content."""

ENTRIES = 1 << 22
"""Weights that are rounded at a time, in float64."""

NAMED = 5
"""Layers that a line of the log names."""

LONGEST_LABEL = 80
"""Characters of a model's name that a folder in the cache begins with; its digest tells folders apart."""

_SHARING = (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"}), frozenset({"w1", "w3"}))
"""Projections of one module that ModelOpt gives one global scale."""


@dataclass(frozen=True)
class Converted:
    """A checkpoint in the cache.

    Attributes:
        folder: its path.
        cached: whether it was there before.
    """

    folder: Path
    cached: bool


def convert(source: Path, recipe: Recipe, cache: Path, trust_remote_code: bool = False) -> Converted:
    """Return the quantized checkpoint of the unquantized one in ``source``, made where it is not in the cache.

    Of several processes that ask at a time one makes it, and the others wait.

    Args:
        source: a folder with safetensors files.
        recipe: how to quantize it.
        cache: the folder that holds the results.
        trust_remote_code: whether the model's own code may run.

    Raises:
        ModelOptExtError: the checkpoint cannot be quantized, or there is no room for the result.
    """
    label = _name_of(source).replace("/", "--") if hub_model(source) else source.resolve().name
    label = re.sub(r"[^\w.-]", "_", label)[:LONGEST_LABEL]
    folder = cache / f"{label}-{recipe.algo}-{_key(source, recipe, cache)[:16]}"
    cached = folder.is_dir()
    if not cached:
        with locked(folder):
            cached = folder.is_dir()  # another process may have made it meanwhile
            if not cached:
                with partial_folder(folder) as scratch:
                    _write(source, recipe, scratch, trust_remote_code)
                    make_readable(scratch)
                    move_into_place(scratch, folder)
    logger.info("modelopt_ext: %s %s, made of %s", "kept before in" if cached else "kept in", folder, source)
    return Converted(folder, cached)


def _name_of(source: Path) -> str:
    """Return the name of a hub model, or the path of another folder."""
    model = hub_model(source)
    return str(source.resolve()) if model is None else model[0]


def _key(source: Path, recipe: Recipe, cache: Path) -> str:
    """Return the sha256 of everything that decides the result; files are read again where they have changed."""
    scales = None
    if recipe.input_scales is not None:
        scales = [file_digest(file) for file in _scale_files(recipe.input_scales)]
    parts = (
        VERSION,
        __version__,
        version("transformers"),
        folder_digest(source, (*HUB_FILES, *CODE_FILES), cache),
        (recipe.algo, recipe.search, recipe.math, recipe.rounds_activations, scales),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _write(source: Path, recipe: Recipe, folder: Path, trust_remote_code: bool) -> None:
    """Write the quantized checkpoint of ``source`` into the empty ``folder``."""
    start = time.monotonic()
    stored = read_headers(source)
    selection = select(source, stored, recipe.weight.group_size, trust_remote_code)
    scales = _input_scales(recipe, selection.quantized)
    # Half an entry's bytes and less: bf16 becomes 4.25 bits.
    quantized = sum(stored[f"{module}.weight"].num_bytes for module in selection.quantized)
    check_space(folder, sum(tensor.num_bytes for tensor in stored.values()) - quantized // 2)
    left = [f"{module} ({reason})" for module, reason in selection.left.items() if reason != BY_DEFAULT]
    if left:
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        logger.warning("modelopt_ext: linear layers that are not quantized: %s%s", ", ".join(left[:NAMED]), more)
    error, max_error = _write_tensors(stored, selection, recipe, scales, folder)
    _copy_files(source, folder)
    _write_configs(source, recipe, selection, folder, error, max_error)
    logger.info(
        "modelopt_ext: quantized %d layers of %s to %s in %.1f s, with %.4f of the squared weight error of a max calibration",
        *(
            len(selection.quantized),
            source,
            recipe.algo,
            time.monotonic() - start,
            error / max_error if max_error else 1.0,
        ),
    )


def _write_tensors(
    stored: Mapping[str, StoredTensor],
    selection: Selection,
    recipe: Recipe,
    scales: Mapping[str, torch.Tensor],
    folder: Path,
) -> tuple[float, float]:
    """Write all tensors; return the sum of squared weight errors, and that of a max calibration."""
    shards, error, max_error = Shards(folder), 0.0, 0.0
    chosen = frozenset(selection.quantized)
    amax = _shared_amax(stored, chosen) if recipe.weight.output_scale is not None else {}
    for file in sorted({tensor.file for tensor in stored.values()}):
        with open_safetensors(file) as handle:
            for name in sorted(tensor.name for tensor in stored.values() if tensor.file == file):
                module, _, last = name.rpartition(".")
                if last != "weight" or module not in chosen:
                    shards.add(name, handle.get_tensor(name))
                    continue
                tensors, found = _layer(stored[name], handle, recipe, amax.get(module))
                error, max_error = error + found[0], max_error + found[1]
                for part, tensor in tensors.items():
                    shards.add(f"{module}.{part}", tensor)
                if module in scales:
                    shards.add(f"{module}.input_scale", scales[module])
    shards.close()
    return error, max_error


def _layer(
    tensor: StoredTensor, handle: Any, recipe: Recipe, amax: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], tuple[float, float]]:
    """Return the stored tensors of one layer, with its squared error and that of a max calibration."""
    parts, error, max_error = [], 0.0, 0.0
    for rows in _rows(tensor, handle, recipe.weight.group_size):
        try:
            rounded = round_rows(recipe.weight, rows, amax, search=recipe.search, math=recipe.math)
        except ValueError as problem:
            raise ModelOptExtError.at(tensor.file, tensor.name, f"a weight for {recipe.algo}", problem) from problem
        parts.append(rounded.tensors)
        error, max_error = error + rounded.error, max_error + rounded.max_error
    scalars = {spec.name for spec in recipe.weight.tensors if spec.is_scalar}
    tensors = {
        name: first if name in scalars else torch.cat([part[name] for part in parts])
        for name, first in parts[0].items()
    }
    return tensors, (error, max_error)


def _rows(tensor: StoredTensor, handle: Any, block: int) -> Iterator[torch.Tensor]:
    """Yield the rows of a weight in parts. Raises ModelOptExtError for NaN and infinity."""
    data, count = handle.get_slice(tensor.name), tensor.shape[0]
    step = max(1, ENTRIES // tensor.shape[1])
    for start in range(0, count, step):
        rows = data[start : min(start + step, count)]
        try:
            check_weight(rows, block)
        except ValueError as problem:
            raise ModelOptExtError.at(tensor.file, tensor.name, "finite weights", problem) from problem
        yield rows


def _shared_amax(stored: Mapping[str, StoredTensor], modules: frozenset[str]) -> dict[str, torch.Tensor]:
    """Return the largest magnitude of each module and those that share a global scale with it, float32 ``[]``."""
    own: dict[str, torch.Tensor] = {}
    for file in sorted({stored[f"{module}.weight"].file for module in modules}):
        with open_safetensors(file) as handle:
            for module in sorted(modules):
                tensor = stored[f"{module}.weight"]
                if tensor.file == file:
                    own[module] = torch.stack([rows.abs().amax() for rows in _rows(tensor, handle, 1)]).amax().float()
    return {module: torch.stack([own[other] for other in _sharing(module, modules)]).amax() for module in modules}


def _sharing(module: str, modules: frozenset[str]) -> list[str]:
    """Return ``module`` and the others that share a global scale with it."""
    parent, _, last = module.rpartition(".")
    names = next((names for names in _SHARING if last in names), frozenset({last}))
    return [other for name in sorted(names) if (other := f"{parent}.{name}") in modules]


def _scale_files(given: Path) -> list[Path]:
    """Return the safetensors files with input scales. Raises ModelOptExtError where there are none."""
    files = sorted(given.glob("*.safetensors")) if given.is_dir() else [given] if given.is_file() else []
    if not files:
        raise ModelOptExtError.at(given, "input scales", "a safetensors file, or a folder of them", "none")
    return files


def _input_scales(recipe: Recipe, modules: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return the given ``input_scale`` of each module, float32 ``[]``. Raises ModelOptExtError for a missing or illegal one."""
    if recipe.input_scales is None:
        return {}
    found: dict[str, torch.Tensor] = {}
    for file in _scale_files(recipe.input_scales):
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


def _copy_files(source: Path, folder: Path) -> None:
    """Copy everything that is neither weights nor configuration: tokenizer, generation defaults, the model's code."""
    own = {CONFIG_NAME, QUANT_CONFIG_NAME, INDEX_NAME}
    for pattern in (*HUB_FILES, *CODE_FILES):
        for file in source.glob(pattern):
            if file.is_file() and file.suffix != ".safetensors" and file.name not in own:
                shutil.copyfile(file, folder / file.name)


def _write_configs(
    source: Path, recipe: Recipe, selection: Selection, folder: Path, error: float, max_error: float
) -> None:
    """Write both configuration files as ModelOpt does, and what this package records."""
    producer = {"name": "sglang_modelopt_ext", "version": __version__}
    excluded = list(selection.excluded)
    group = {"group_size": recipe.weight.group_size} if recipe.algo.isupper() else {}
    declared = {"quant_algo": recipe.algo, "kv_cache_quant_algo": None, **group, "exclude_modules": excluded}
    own = {
        ROUNDS_ACTIVATIONS: recipe.rounds_activations,
        "version": __version__,
        "recipe": recipe.algo,
        "base_model": _name_of(source),
        "simulation": WITHOUT_MODELOPT,
        "algorithm": [{"method": "mse", "math": recipe.math} if recipe.search else {"method": "max"}],
        "quality": {"squared_weight_error": error, "squared_weight_error_max": max_error},
    }
    content = {"producer": producer, "quantization": declared, OWN_KEY: own}
    (folder / QUANT_CONFIG_NAME).write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    section = {"ignore": excluded, "quant_algo": recipe.algo, "producer": producer, "quant_method": "modelopt"}
    config = {**read_json_object(source / CONFIG_NAME), "quantization_config": section}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
