"""The quantization section of a checkpoint, from ``config.json``, ``hf_quant_config.json`` or both.

ModelOpt writes ``hf_quant_config.json`` (``{"producer": ..., "quantization": {...}}``) and, since 0.29, a converted copy of it
as ``quantization_config`` in ``config.json``. The copy has fewer fields (no ``group_size`` for most formats) and calls the
exclusions ``ignore``. A field that only one of the two files has is taken from it. Fields that both have must be equal, except the
exclusions: for a module that only one file excludes, its tensors decide.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_modelopt_ext.checkpoint.names import EXPERT, Exclusions
from sglang_modelopt_ext.checkpoint.names import canonical_name as canonical_name
from sglang_modelopt_ext.checkpoint.tensors import read_json_object
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.table import MIXED_PRECISION
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES

CONFIG_NAME = "config.json"
QUANT_CONFIG_NAME = "hf_quant_config.json"

OWN_KEY = "sglang_modelopt_ext"
"""Top-level key of hf_quant_config.json for facts that ModelOpt's export loses; written by this package, ignored by other tools."""

ROUNDS_ACTIVATIONS = "rounds_activations"
"""Key under :data:`OWN_KEY`: whether the recipe rounds the input of its linear layers."""

WITHOUT_MODELOPT = "none"
"""Value of ``simulation`` under :data:`OWN_KEY` of a checkpoint that was made without ModelOpt."""

KV_CACHE_RECIPE = "kv_cache_recipe"
"""Key under :data:`OWN_KEY`: the KV cache's recipe, which tells a rotated cache from a plain one."""

KV_CACHE_LAYERS = "kv_cache_layers"
"""Key under :data:`OWN_KEY`: by layer number, the recipes of layers whose cache has another one."""

MOST_DIGITS = 6
"""Of the number of a layer, at most."""


_KV_CACHE_KEYS = ("kv_cache_quant_algo", "kv_cache_scheme")
_KV_CACHE_BITS = {8: "FP8", 4: "NVFP4"}


@dataclass(frozen=True)
class LayerQuantization:
    """The configuration's entry for one layer: its algorithm (upper case), and its group size or None where it is not stated."""

    algo: str
    group_size: int | None = None


@dataclass(frozen=True)
class QuantConfig:
    """The quantization that a checkpoint declares.

    Attributes:
        file: the file that errors name.
        algo: ``quant_algo`` in upper case, None for a checkpoint that quantizes only its KV cache.
        group_size: K elements per block scale, None where the configuration does not state it.
        exclude_modules: patterns of modules that are not quantized.
        doubtful_modules: patterns that only one of two files excludes; the tensors decide.
        quantized_layers: for MIXED_PRECISION, the entry of each layer by its name.
        kv_cache_algo: ``kv_cache_quant_algo`` in upper case, or None.
        rounds_activations: recorded in exports of this package, None elsewhere.
        kv_cache_recipe: recorded in exports of this package, a name of ``KV_RECIPES``; None elsewhere.
        kv_cache_layers: recorded there too, by layer number: the recipes of layers whose cache has another one.
        notes: one-line warnings for the log, such as a difference between the two files.
    """

    file: Path
    algo: str | None = None
    group_size: int | None = None
    exclude_modules: tuple[str, ...] = ()
    quantized_layers: Mapping[str, LayerQuantization] = field(default_factory=dict)
    kv_cache_algo: str | None = None
    rounds_activations: bool | None = None
    kv_cache_recipe: str | None = None
    kv_cache_layers: Mapping[int, str] = field(default_factory=dict)
    doubtful_modules: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def is_excluded(self, module: str) -> bool:
        """Return whether ``module``, by its name in the checkpoint or in SGLang, is declared as not quantized."""
        return self._excluded.cover(module)

    def layer(self, module: str, *, stored: bool = False) -> LayerQuantization | None:
        """Return the declared quantization of ``module``, None when it is declared as not quantized.

        Args:
            module: its name in the checkpoint or in SGLang.
            stored: whether it has the tensors of a quantized layer, which decides where two files differ.
        """
        if self.algo is None or self.is_excluded(module) or (not stored and self._doubtful.cover(module)):
            return None
        if self.algo != MIXED_PRECISION:
            return LayerQuantization(self.algo, self.group_size)
        return self.listed(module)

    def listed(self, module: str) -> LayerQuantization | None:
        """Return the entry of ``module`` in ``quantized_layers``, even if it is excluded; None where it is not listed."""
        wanted = canonical_name(module)
        expert = EXPERT.fullmatch(wanted)
        # ModelOpt lists all experts of a layer as one entry, since they are one module in Hugging Face's model.
        return self._listed.get(wanted) or (self._listed.get(expert["layer"]) if expert else None)

    def renamed(self, rename: Callable[[str], str | None]) -> QuantConfig:
        """Return a copy in which every pattern and listed layer also has the name that ``rename`` returns for it, if any."""

        def both(names: Iterable[str]) -> tuple[str, ...]:
            return tuple(dict.fromkeys(name for old in names for name in (old, rename(old)) if name is not None))

        layers = {name: entry for old, entry in self.quantized_layers.items() if (name := rename(old)) is not None}
        return dataclasses.replace(
            self,
            exclude_modules=both(self.exclude_modules),
            doubtful_modules=both(self.doubtful_modules),
            quantized_layers={**layers, **self.quantized_layers},
        )

    @functools.cached_property
    def _excluded(self) -> Exclusions:
        return Exclusions(self.exclude_modules)

    @functools.cached_property
    def _doubtful(self) -> Exclusions:
        return Exclusions(self.doubtful_modules)

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The distinct algorithms of its layers, sorted; empty where only the KV cache is quantized."""
        if self.algo == MIXED_PRECISION:
            return tuple(sorted({layer.algo for layer in self.quantized_layers.values()}))
        return (self.algo,) if self.algo else ()

    @functools.cached_property
    def _listed(self) -> dict[str, LayerQuantization]:
        """``quantized_layers`` by canonical name, cached because a large mixture lists tens of thousands of layers."""
        return {canonical_name(name): quantization for name, quantization in self.quantized_layers.items()}


def text_config(folder: Path) -> Mapping[str, Any]:
    """Return the language model's fields of config.json (``text_config`` of a multimodal model); empty without a file."""
    if not (folder / CONFIG_NAME).exists():
        return {}
    content = read_json_object(folder / CONFIG_NAME)
    text = content.get("text_config")
    return text if isinstance(text, Mapping) else content


def is_modelopt_section(section: object) -> bool:
    """Return whether ``section``, a ``quantization_config`` of config.json, was written by ModelOpt."""
    if not isinstance(section, Mapping):
        return False
    method = section.get("quant_method")
    if isinstance(method, str):
        return method.lower().startswith("modelopt")
    producer = section.get("producer")
    named = isinstance(producer, Mapping) and str(producer.get("name", "")).startswith("modelopt")
    return named or "quant_algo" in section


def read_quant_config(folder: Path) -> QuantConfig | None:
    """Return the quantization that the checkpoint in ``folder`` declares, or None when ModelOpt did not quantize it.

    Raises:
        ModelOptExtError: a file is not JSON, a field has the wrong type, the two files contradict each other, or ``config.json``
            names another method beside an ``hf_quant_config.json``.
    """
    quant_file, config_file = folder / QUANT_CONFIG_NAME, folder / CONFIG_NAME
    declared = []
    if quant_file.exists():
        content = read_json_object(quant_file)
        if content.get("quantization") != {}:  # an empty section declares nothing
            declared.append(_fields(content, quant_file))
    if config_file.exists():
        for section in quantization_sections(read_json_object(config_file)):
            if is_modelopt_section(section):
                assert isinstance(section, Mapping), "a section of ModelOpt's is an object"
                declared.append(_fields(section, config_file))
                break
            if quant_file.exists():
                raise ModelOptExtError.at(
                    config_file,
                    "quantization_config.quant_method",
                    f"modelopt, as in {QUANT_CONFIG_NAME}",
                    repr(section)[:80],
                )
    if not declared:
        return None
    return QuantConfig(**(_merge(*declared) if len(declared) == 2 else declared[0]))


def quantization_sections(config: Mapping[str, Any]) -> list[object]:
    """Return the quantization sections of a ``config.json`` that are not null, in SGLang's order of preference.

    Multimodal configurations may keep the language model's section in ``text_config``; ``compression_config`` is the key of
    compressed-tensors.
    """
    text = config.get("text_config")
    found = [
        config.get("quantization_config"),
        text.get("quantization_config") if isinstance(text, Mapping) else None,
        config.get("compression_config"),
    ]
    return [section for section in found if section is not None]


def parse_quant_config(content: Mapping[str, Any], file: Path) -> QuantConfig:
    """Read one section, nested (``{"quantization": {...}}``) or flat.

    Raises:
        ModelOptExtError: a malformed field, naming ``file``.
    """
    return QuantConfig(**_fields(content, file))


def _fields(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the fields of :class:`QuantConfig` that a section states. Raises ModelOptExtError for a malformed one."""
    section = content.get("quantization", content)
    # config.json leaves the algorithm out where only the KV cache is quantized.
    if not isinstance(section, Mapping) or not section.keys() & {"quant_algo", *_KV_CACHE_KEYS}:
        raise ModelOptExtError.at(file, "quantization.quant_algo", "the name of a ModelOpt algorithm", "no such field")
    algo = section.get("quant_algo")
    if algo is not None and (not isinstance(algo, str) or not algo):
        raise ModelOptExtError.at(file, "quant_algo", "a string or null", repr(algo))
    found: dict[str, Any] = {"file": file}
    if "quant_algo" in section:
        found["algo"] = algo.upper() if algo else None
    optional = {
        "group_size": _group_size(section, file),
        "exclude_modules": _exclusions(section, file),
        "quantized_layers": _quantized_layers(section, file) or None,
        "rounds_activations": _rounds_activations(content, file),
        "kv_cache_recipe": _kv_cache_recipe(content, file),
        "kv_cache_layers": _kv_cache_layers(content, file),
    }
    found |= {name: value for name, value in optional.items() if value is not None}
    if section.keys() & set(_KV_CACHE_KEYS):  # null is a statement too: no quantized cache
        found["kv_cache_algo"] = _kv_cache_algo(section, file)
    return found


def _positive_int(value: object, file: Path, name: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelOptExtError.at(file, name, "a positive integer", repr(value))
    return value


def _group_size(section: Mapping[str, Any], file: Path) -> int | None:
    declared = _positive_int(section.get("group_size"), file, "group_size")
    groups = section.get("config_groups")
    # For MIXED_PRECISION, config_groups are guesses of ModelOpt's conversion, which writes 16 where it knows nothing.
    mixed = str(section.get("quant_algo")).upper() == MIXED_PRECISION
    if declared is None and not mixed and isinstance(groups, Mapping) and len(groups) == 1:
        (group,) = groups.values()
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            declared = _positive_int(weights.get("group_size"), file, "config_groups.weights.group_size")
    return declared


def _exclusions(section: Mapping[str, Any], file: Path) -> tuple[str, ...] | None:
    for name in ("exclude_modules", "ignore"):
        value = section.get(name)
        if value is None:
            continue
        if (
            not isinstance(value, Sequence)
            or isinstance(value, str)
            or not all(isinstance(item, str) for item in value)
        ):
            raise ModelOptExtError.at(file, name, "a list of module patterns", repr(value)[:80])
        return tuple(value)
    return None


def _quantized_layers(section: Mapping[str, Any], file: Path) -> dict[str, LayerQuantization]:
    layers = section.get("quantized_layers") or {}
    if not isinstance(layers, Mapping):
        raise ModelOptExtError.at(file, "quantized_layers", "an object of layer names", repr(layers)[:80])
    found = {}
    for name, entry in layers.items():
        algo = entry.get("quant_algo") if isinstance(entry, Mapping) else None
        if not isinstance(algo, str) or not algo:
            raise ModelOptExtError.at(file, f"quantized_layers.{name}", "an object with a quant_algo", repr(entry)[:80])
        group_size = entry.get("group_size") or None  # ModelOpt writes 0 for "no groups" in this field
        found[name] = LayerQuantization(
            algo.upper(), _positive_int(group_size, file, f"quantized_layers.{name}.group_size")
        )
    return found


def _kv_cache_algo(section: Mapping[str, Any], file: Path) -> str | None:
    value = next(section[key] for key in _KV_CACHE_KEYS if key in section)
    if isinstance(value, Mapping):  # the converted form of config.json
        for bits, name in _KV_CACHE_BITS.items():
            if value.get("type") == "float" and value.get("num_bits") == bits:
                return name
        raise ModelOptExtError.at(file, "kv_cache_scheme", "an 8-bit or 4-bit float or a name", repr(dict(value))[:80])
    if value is not None and not isinstance(value, str):
        raise ModelOptExtError.at(file, "kv_cache_quant_algo", "a string or null", repr(value))
    return value.upper() if value else None


def _rounds_activations(content: Mapping[str, Any], file: Path) -> bool | None:
    own = content.get(OWN_KEY)
    value = own.get(ROUNDS_ACTIVATIONS) if isinstance(own, Mapping) else None
    if value is not None and not isinstance(value, bool):
        raise ModelOptExtError.at(file, f"{OWN_KEY}.{ROUNDS_ACTIVATIONS}", "true or false", repr(value))
    return value


def _kv_cache_recipe(content: Mapping[str, Any], file: Path) -> str | None:
    own = content.get(OWN_KEY)
    value = own.get(KV_CACHE_RECIPE) if isinstance(own, Mapping) else None
    if value is not None and value not in tuple(KV_RECIPES):
        raise ModelOptExtError.at(file, f"{OWN_KEY}.{KV_CACHE_RECIPE}", f"one of {', '.join(KV_RECIPES)}", repr(value))
    return value


def _kv_cache_layers(content: Mapping[str, Any], file: Path) -> dict[int, str] | None:
    own = content.get(OWN_KEY)
    value = own.get(KV_CACHE_LAYERS) if isinstance(own, Mapping) else None
    if value is None:
        return None
    where = f"{OWN_KEY}.{KV_CACHE_LAYERS}"
    if not isinstance(value, Mapping):
        raise ModelOptExtError.at(file, where, "recipes by layer number", repr(value))
    for layer, recipe in value.items():
        # Only decimal digits, and no number in two forms.
        is_number = isinstance(layer, str) and layer.isascii() and layer.isdigit() and len(layer) <= MOST_DIGITS
        if not is_number or layer != str(int(layer)):
            raise ModelOptExtError.at(file, where, "layer numbers", repr(layer))
        if recipe not in tuple(KV_RECIPES):
            raise ModelOptExtError.at(file, f"{where}.{layer}", f"one of {', '.join(KV_RECIPES)}", repr(recipe))
    return {int(layer): recipe for layer, recipe in value.items()}


def _merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the union of the fields of two files. Raises ModelOptExtError where both state a field differently."""
    where, file = second["file"], first["file"]
    for name, key in (("quant_algo", "algo"), ("group_size", "group_size"), ("kv_cache_quant_algo", "kv_cache_algo")):
        if key in first and key in second and first[key] != second[key]:
            raise ModelOptExtError.at(where, name, f"{first[key]}, as in {file.name}", second[key])
    layers, others = first.get("quantized_layers"), second.get("quantized_layers")
    if layers is not None and others is not None and layers != others:
        differ = sorted(name for name in layers.keys() | others.keys() if layers.get(name) != others.get(name))
        raise ModelOptExtError.at(where, f"quantized_layers.{differ[0]}", f"as in {file.name}", "another value")
    merged = {**second, **first}
    excluded, ignored = first.get("exclude_modules"), second.get("exclude_modules")
    if excluded is not None and ignored is not None and set(excluded) != set(ignored):
        merged["exclude_modules"] = tuple(name for name in excluded if name in ignored)
        doubtful = tuple(name for name in dict.fromkeys((*excluded, *ignored)) if name not in merged["exclude_modules"])
        merged["doubtful_modules"] = doubtful
        few = ", ".join(doubtful[:3]) + (f" and {len(doubtful) - 3} more" if len(doubtful) > 3 else "")
        merged["notes"] = (f"{where}: ignore differs from exclude_modules of {file.name} in {few}: the tensors decide",)
    return merged
