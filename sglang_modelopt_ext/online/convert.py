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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

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
    read_headers,
    read_json_object,
)
from sglang_modelopt_ext.files.digest import file_digest, folder_digest
from sglang_modelopt_ext.files.whole import check_space, locked, make_readable, move_into_place, partial_folder
from sglang_modelopt_ext.online.apart import write_apart
from sglang_modelopt_ext.online.recipe import Recipe
from sglang_modelopt_ext.online.selection import BY_DEFAULT, Selection, select
from sglang_modelopt_ext.online.tensors import scale_files, write_tensors

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the conversion: another one makes other checkpoints of the same content."""

NAMED = 5
"""Layers that a line of the log names."""

LONGEST_LABEL = 80
"""Characters of a model's name that a folder in the cache begins with; its digest tells folders apart."""


@dataclass(frozen=True)
class Converted:
    """A checkpoint in the cache.

    Attributes:
        folder: its path.
        cached: whether it was there before.
    """

    folder: Path
    cached: bool


def convert(
    source: Path, recipe: Recipe, cache: Path, trust_remote_code: bool = False, gpu: int | None = None
) -> Converted:
    """Return the quantized checkpoint of the unquantized one in ``source``, made where it is not in the cache.

    Of several processes that ask at a time one makes it, and the others wait.

    Args:
        source: a folder with safetensors files.
        recipe: how to quantize it.
        cache: the folder that holds the results.
        trust_remote_code: whether the model's own code may run.
        gpu: the number of the GPU that rounds the weights, to the same bits as the CPU; None for the CPU.

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
                    _write(source, recipe, scratch, trust_remote_code, gpu)
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
        scales = [file_digest(file) for file in scale_files(recipe.input_scales)]
    parts = (
        VERSION,
        __version__,
        version("transformers"),
        folder_digest(source, (*HUB_FILES, *CODE_FILES), cache),
        (recipe.algo, recipe.search, recipe.math, recipe.rounds_activations, scales),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _write(source: Path, recipe: Recipe, folder: Path, trust_remote_code: bool, gpu: int | None) -> None:
    """Write the quantized checkpoint of ``source`` into the empty ``folder``."""
    start = time.monotonic()
    stored = read_headers(source)
    selection = select(source, stored, recipe.weight.group_size, trust_remote_code)
    # Half an entry's bytes and less: bf16 becomes 4.25 bits.
    quantized = sum(stored[f"{module}.weight"].num_bytes for module in selection.quantized)
    check_space(folder, sum(tensor.num_bytes for tensor in stored.values()) - quantized // 2)
    left = [f"{module} ({reason})" for module, reason in selection.left.items() if reason != BY_DEFAULT]
    if left:
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        logger.warning("modelopt_ext: linear layers that are not quantized: %s%s", ", ".join(left[:NAMED]), more)
    if gpu is None:
        error, max_error = write_tensors(source, selection.quantized, recipe, folder)
    else:
        error, max_error = write_apart(source, selection.quantized, recipe, folder, f"cuda:{gpu}")
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
