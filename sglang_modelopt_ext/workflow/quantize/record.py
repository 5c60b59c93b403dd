"""The metadata of a checkpoint made by this package, under one key of hf_quant_config.json.

ModelOpt's export loses how the checkpoint was made, and some facts that a server needs. All of it is written under
:data:`~sglang_modelopt_ext.checkpoint.quant_config.OWN_KEY` at the top level of ``hf_quant_config.json``, where other tools
ignore it. ``docs/quantize.md`` documents every field; a test keeps the two in step.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from sglang_modelopt_ext.checkpoint.quant_config import OWN_KEY, QUANT_CONFIG_NAME
from sglang_modelopt_ext.checkpoint.reader import Checkpoint
from sglang_modelopt_ext.checkpoint.tensors import read_json_object
from sglang_modelopt_ext.errors import ModelOptExtError

PACKAGES = ("sglang-modelopt-ext", "nvidia-modelopt", "torch", "transformers")


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """The calibration data.

    Attributes:
        data: files or data sets, as given.
        sha256: of the token windows in order.
        samples: number of windows.
        tokens: total number of tokens.
        sequence_length: the most text tokens per window.
        batch_size: the most windows in one forward pass.
        seed: selects windows from longer data.
    """

    data: tuple[str, ...]
    sha256: str
    samples: int
    tokens: int
    sequence_length: int
    batch_size: int
    seed: int


class KVCache(msgspec.Struct, frozen=True, kw_only=True):
    """The quantized KV cache.

    Attributes:
        rotate: keys are rotated before rounding.
        affine: a static bias is subtracted before rounding.
        calibrated: False where every layer has the scale of an amax of 448.
    """

    rotate: bool
    affine: bool
    calibrated: bool


class LayerFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Linear layers that share a quantized format.

    Attributes:
        algo: ModelOpt's algorithm, in upper case.
        group_size: K elements per block scale, 0 without blocks.
        pre_quant_scale: whether the layers' inputs are multiplied by a stored smoothing scale.
        low_rank: the rank of SVDQuant's branch, 0 without one.
        layers: their names in the checkpoint.
        activation: the number format their input is rounded to; ``none`` where it is not rounded.
    """

    algo: str
    group_size: int
    pre_quant_scale: bool
    low_rank: int
    layers: tuple[str, ...]
    activation: str = ""


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """The user's changes to the recipe.

    Attributes:
        mlp_only: only the linear layers of the MLPs are quantized.
        exclude: patterns of modules left unquantized.
        overrides: ``key=value`` changes of the recipe.
    """

    mlp_only: bool = False
    exclude: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """The origin of a quantized model: facts that the model itself does not hold.

    Attributes:
        recipe: the name of a ModelOpt configuration, of a recipe file, or of the search that chose the formats.
        base_model: the unquantized model, as given.
        algorithm: ModelOpt's calibration algorithms in order, with every option.
        calibration: the calibration data; None without calibration.
        simulation: how ModelOpt's CUDA-only quantizers were simulated: ``cuda``, or ``cpu`` for torch versions;
            ``none`` where ModelOpt was not used.
        selection: the changes to the recipe.
        smoothed, searched: numbers of linear layers with smoothing scales, and with searched scales.
        search: the result of a search over formats; None for a single recipe.
    """

    recipe: str
    base_model: str
    algorithm: tuple[dict[str, Any], ...]
    calibration: Calibration | None
    simulation: str
    selection: Selection = Selection()
    smoothed: int = 0
    searched: int = 0
    search: dict[str, Any] | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The recorded metadata of a checkpoint. This package's reader uses the first three fields.

    A field that an older version of this package did not write has its default.

    Attributes:
        rounds_activations: whether the inputs of MXFP4 layers are rounded; without such layers, those of any layer.
        kv_cache_recipe: the KV cache's recipe, a name of ``KV_RECIPES``, or None.
        kv_cache_layers: the recipes of layers whose cache has another one, by layer number.
        version: of this package.
        recipe, base_model, algorithm, calibration, simulation, selection, smoothed, searched, search: see :class:`Origin`.
        kv_cache: the parts of the KV cache's recipe; None without one.
        formats: the quantized linear layers, grouped by format.
        bits_per_weight: stored bits per quantized weight, scales included.
        versions: versions of the packages that made the checkpoint.
        quality: measured figures by name, such as ``perplexity``; empty when nothing was measured.
    """

    rounds_activations: bool | None = None
    kv_cache_recipe: str | None = None
    kv_cache_layers: dict[str, str] = {}
    version: str = ""
    recipe: str = ""
    base_model: str = ""
    algorithm: tuple[dict[str, Any], ...] = ()
    calibration: Calibration | None = None
    simulation: str = ""
    selection: Selection = Selection()
    smoothed: int = 0
    searched: int = 0
    search: dict[str, Any] | None = None
    kv_cache: KVCache | None = None
    formats: tuple[LayerFormat, ...] = ()
    bits_per_weight: float | None = None
    versions: dict[str, str] = {}
    quality: dict[str, float] = {}


def write_record(folder: Path, record: Record) -> None:
    """Write the record into the folder's hf_quant_config.json."""
    file = folder / QUANT_CONFIG_NAME
    content = read_json_object(file)
    content[OWN_KEY] = msgspec.to_builtins(record)
    file.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def read_record(folder: Path) -> Record | None:
    """Return the recorded metadata; None for a checkpoint this package did not make.

    Raises:
        ModelOptExtError: a field of another type.
    """
    file = folder / QUANT_CONFIG_NAME
    content = read_json_object(file).get(OWN_KEY) if file.is_file() else None
    if content is None:
        return None
    try:
        return msgspec.convert(content, Record)
    except msgspec.ValidationError as error:
        raise ModelOptExtError.at(file, OWN_KEY, "what this package records", error) from error


def layer_formats(checkpoint: Checkpoint) -> tuple[LayerFormat, ...]:
    """Return the quantized linear layers of a checkpoint, grouped by format, in the order of first occurrence."""
    groups: dict[tuple[str, int, bool, int, str], list[str]] = {}
    for linear in checkpoint.layers:
        scheme = linear.scheme
        activation = scheme.activation.name if scheme.activation else "none"
        key = (scheme.algo, scheme.weight.group_size, scheme.smoothing, scheme.low_rank, activation)
        groups.setdefault(key, []).append(linear.name)
    return tuple(
        LayerFormat(
            algo=algo,
            group_size=group,
            pre_quant_scale=smooth,
            low_rank=rank,
            layers=tuple(names),
            activation=activation,
        )
        for (algo, group, smooth, rank, activation), names in groups.items()
    )


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a checkpoint depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
