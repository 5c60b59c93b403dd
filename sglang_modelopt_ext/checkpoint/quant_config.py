"""The quantization section of a checkpoint, from ``config.json``, ``hf_quant_config.json`` or both.

ModelOpt writes ``hf_quant_config.json`` (``{"producer": ..., "quantization": {...}}``) and, since 0.29, a converted copy of it
as ``quantization_config`` in ``config.json``. The copy knows less (no ``group_size`` for most formats) and calls the
exclusions ``ignore``. Where both are there they must not contradict each other; what only one of them says is taken from it.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_modelopt_ext.checkpoint.tensors import read_json_object
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.table import MIXED_PRECISION
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES

CONFIG_NAME = "config.json"
QUANT_CONFIG_NAME = "hf_quant_config.json"

OWN_KEY = "sglang_modelopt_ext"
"""Top level of hf_quant_config.json: what ModelOpt's export loses, recorded by this package and ignored by other tools."""

ROUNDS_ACTIVATIONS = "rounds_activations"
"""Under :data:`OWN_KEY`: whether the recipe rounds the input of its linear layers."""

KV_CACHE_RECIPE = "kv_cache_recipe"
"""Under :data:`OWN_KEY`: the KV cache's recipe, which tells a rotated cache from a plain one."""

EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?P<number>\d+)\.(?P<projection>\w+)")
"""The name of one projection of one expert."""

_NOT_NAMED = ("model", "language_model")


def canonical_name(module: str) -> str:
    """A module's name without the wrappers around the decoder.

    The same linear layer is ``model.layers.0.mlp.up_proj`` in a text model's checkpoint, ``model.language_model.layers...`` in a
    multimodal one and ``language_model.model.layers...`` in SGLang's module tree. Only leading parts are dropped.
    """
    parts = module.split(".")
    while len(parts) > 1 and parts[0] in _NOT_NAMED:
        parts.pop(0)
    return ".".join(parts)


def matches(pattern: str, module: str) -> bool:
    """Whether an exclusion pattern names ``module``: by wildcard, exactly, or by naming one of its parents."""
    pattern, module = canonical_name(pattern), canonical_name(module)
    return fnmatch.fnmatchcase(module, pattern) or module.startswith(pattern + ".")


@dataclass(frozen=True)
class LayerQuantization:
    """What the configuration says of one layer: its algorithm (upper case) and, where it says so, its group size."""

    algo: str
    group_size: int | None = None


@dataclass(frozen=True)
class QuantConfig:
    """The quantization a checkpoint declares.

    Attributes:
        file: the file errors about it name.
        algo: ``quant_algo`` in upper case, None for a checkpoint that quantizes only its KV cache.
        group_size: inputs per block scale, None when the configuration leaves it out.
        exclude_modules: patterns of modules that are not quantized.
        quantized_layers: for MIXED_PRECISION, what each layer is.
        kv_cache_algo: the KV cache's scheme in upper case, or None.
        rounds_activations: recorded by this package's own exports, None elsewhere.
        kv_cache_recipe: likewise, a name of ``KV_RECIPES``.
    """

    file: Path
    algo: str | None
    group_size: int | None = None
    exclude_modules: tuple[str, ...] = ()
    quantized_layers: Mapping[str, LayerQuantization] = field(default_factory=dict)
    kv_cache_algo: str | None = None
    rounds_activations: bool | None = None
    kv_cache_recipe: str | None = None

    def is_excluded(self, module: str) -> bool:
        """Whether ``module`` (a checkpoint's or SGLang's name of it) is declared as not quantized."""
        return any(matches(pattern, module) for pattern in self.exclude_modules)

    def layer(self, module: str) -> LayerQuantization | None:
        """How ``module`` is quantized according to the configuration, None when it is not."""
        if self.algo is None or self.is_excluded(module):
            return None
        if self.algo != MIXED_PRECISION:
            return LayerQuantization(self.algo, self.group_size)
        wanted = canonical_name(module)
        expert = EXPERT.fullmatch(wanted)
        # ModelOpt lists all experts of a layer as the one module they are in Hugging Face's model.
        return self._listed.get(wanted) or (self._listed.get(expert["layer"]) if expert else None)

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The algorithms of its layers, each once, sorted; none where only the KV cache is quantized."""
        if self.algo == MIXED_PRECISION:
            return tuple(sorted({layer.algo for layer in self.quantized_layers.values()}))
        return (self.algo,) if self.algo else ()

    @functools.cached_property
    def _listed(self) -> dict[str, LayerQuantization]:
        """``quantized_layers`` by canonical name; a large mixture lists tens of thousands."""
        return {canonical_name(name): quantization for name, quantization in self.quantized_layers.items()}


def text_config(folder: Path) -> Mapping[str, Any]:
    """The language model's fields of config.json, empty without one."""
    if not (folder / CONFIG_NAME).exists():
        return {}
    content = read_json_object(folder / CONFIG_NAME)
    text = content.get("text_config")
    return text if isinstance(text, Mapping) else content


def is_modelopt_section(section: object) -> bool:
    """Whether a ``quantization_config`` of config.json was written by ModelOpt."""
    if not isinstance(section, Mapping):
        return False
    method = section.get("quant_method")
    if isinstance(method, str):
        return method.lower().startswith("modelopt")
    producer = section.get("producer")
    named = isinstance(producer, Mapping) and str(producer.get("name", "")).startswith("modelopt")
    return named or "quant_algo" in section


def read_quant_config(folder: Path) -> QuantConfig | None:
    """The quantization of the checkpoint in ``folder``, or None when ModelOpt did not write one.

    Raises:
        ModelOptExtError: a file that is not JSON, a field of the wrong type, or the two files disagreeing.
    """
    sections: list[QuantConfig] = []
    quant_file, config_file = folder / QUANT_CONFIG_NAME, folder / CONFIG_NAME
    if quant_file.exists():
        sections.append(parse_quant_config(read_json_object(quant_file), quant_file))
    if config_file.exists():
        config = read_json_object(config_file)
        # Multimodal configurations keep the language model's section one level down.
        for owner in (config, config.get("text_config")):
            section = owner.get("quantization_config") if isinstance(owner, Mapping) else None
            if isinstance(section, Mapping) and is_modelopt_section(section):
                sections.append(parse_quant_config(section, config_file))
                break
            if section is not None and quant_file.exists():
                raise ModelOptExtError.at(
                    config_file,
                    "quantization_config.quant_method",
                    f"modelopt, as in {QUANT_CONFIG_NAME}",
                    repr(section)[:80],
                )
    if not sections:
        return None
    return sections[0] if len(sections) == 1 else _merge(sections[0], sections[1])


def parse_quant_config(content: Mapping[str, Any], file: Path) -> QuantConfig:
    """Reads one section, nested (``{"quantization": {...}}``) or flat. Raises ModelOptExtError for a malformed field."""
    section = content.get("quantization", content)
    # config.json leaves the algorithm out where only the KV cache is quantized.
    if not isinstance(section, Mapping) or not section.keys() & {"quant_algo", "kv_cache_scheme"}:
        raise ModelOptExtError.at(file, "quantization.quant_algo", "the name of a ModelOpt algorithm", "no such field")
    algo = section.get("quant_algo")
    if algo is not None and (not isinstance(algo, str) or not algo):
        raise ModelOptExtError.at(file, "quant_algo", "a string or null", repr(algo))
    return QuantConfig(
        file=file,
        algo=algo.upper() if algo else None,
        group_size=_group_size(section, file),
        exclude_modules=_exclusions(section, file),
        quantized_layers=_quantized_layers(section, file),
        kv_cache_algo=_kv_cache_algo(section, file),
        rounds_activations=_rounds_activations(content, file),
        kv_cache_recipe=_kv_cache_recipe(content, file),
    )


def _positive_int(value: object, file: Path, name: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelOptExtError.at(file, name, "a positive integer", repr(value))
    return value


def _group_size(section: Mapping[str, Any], file: Path) -> int | None:
    declared = _positive_int(section.get("group_size"), file, "group_size")
    groups = section.get("config_groups")
    # For MIXED_PRECISION the groups are per-layer guesses of the conversion (it writes 16 where nothing is known).
    mixed = str(section.get("quant_algo")).upper() == MIXED_PRECISION
    if declared is None and not mixed and isinstance(groups, Mapping) and len(groups) == 1:
        weights = next(iter(groups.values())).get("weights")
        if isinstance(weights, Mapping):
            declared = _positive_int(weights.get("group_size"), file, "config_groups.weights.group_size")
    return declared


def _exclusions(section: Mapping[str, Any], file: Path) -> tuple[str, ...]:
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
    return ()


def _quantized_layers(section: Mapping[str, Any], file: Path) -> dict[str, LayerQuantization]:
    layers = section.get("quantized_layers") or {}
    if not isinstance(layers, Mapping):
        raise ModelOptExtError.at(file, "quantized_layers", "an object of layer names", repr(layers)[:80])
    found = {}
    for name, entry in layers.items():
        algo = entry.get("quant_algo") if isinstance(entry, Mapping) else None
        if not isinstance(algo, str) or not algo:
            raise ModelOptExtError.at(file, f"quantized_layers.{name}", "an object with a quant_algo", repr(entry)[:80])
        group_size = entry.get("group_size") or None  # 0 is how ModelOpt writes "no groups" for this field
        found[name] = LayerQuantization(
            algo.upper(), _positive_int(group_size, file, f"quantized_layers.{name}.group_size")
        )
    return found


def _kv_cache_algo(section: Mapping[str, Any], file: Path) -> str | None:
    value = section.get("kv_cache_quant_algo", section.get("kv_cache_scheme"))
    if isinstance(value, Mapping):
        # The converted form of config.json; only FP8 has one.
        if value.get("type") == "float" and value.get("num_bits") == 8:
            return "FP8"
        raise ModelOptExtError.at(file, "kv_cache_scheme", "8-bit float or a name", repr(dict(value))[:80])
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
    if value is not None and value not in KV_RECIPES:
        raise ModelOptExtError.at(file, f"{OWN_KEY}.{KV_CACHE_RECIPE}", f"one of {', '.join(KV_RECIPES)}", repr(value))
    return value


def _merge(first: QuantConfig, second: QuantConfig) -> QuantConfig:
    """One description from two files; raises ModelOptExtError where both speak and disagree."""
    for name, mine, other in (
        ("quant_algo", first.algo, second.algo),
        ("group_size", first.group_size, second.group_size),
        ("kv_cache_quant_algo", first.kv_cache_algo, second.kv_cache_algo),
    ):
        silent = other is None and name == "group_size"
        if mine != other and not silent and not (mine is None and name == "group_size"):
            raise ModelOptExtError.at(second.file, name, f"{mine}, as in {first.file.name}", other)
    if set(first.exclude_modules) != set(second.exclude_modules):
        differ = sorted(set(first.exclude_modules) ^ set(second.exclude_modules))
        raise ModelOptExtError.at(
            second.file, "ignore", f"the exclude_modules of {first.file.name}", f"a difference in {', '.join(differ)}"
        )
    if first.quantized_layers and second.quantized_layers and first.quantized_layers != second.quantized_layers:
        names = set(first.quantized_layers) | set(second.quantized_layers)
        differ = sorted(n for n in names if first.quantized_layers.get(n) != second.quantized_layers.get(n))
        raise ModelOptExtError.at(
            second.file, f"quantized_layers.{differ[0]}", f"as in {first.file.name}", "another value"
        )
    return QuantConfig(
        file=first.file,
        algo=first.algo,
        group_size=first.group_size if first.group_size is not None else second.group_size,
        exclude_modules=first.exclude_modules,
        quantized_layers=first.quantized_layers or second.quantized_layers,
        kv_cache_algo=first.kv_cache_algo,
        rounds_activations=first.rounds_activations,
        kv_cache_recipe=first.kv_cache_recipe,
    )
