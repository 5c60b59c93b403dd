"""ModelOpt's recipes by name, and the user's changes to one: the KV cache, the algorithm, the layers, any field.

A name is, in this order: a configuration of ``modelopt.torch.quantization`` (``NVFP4_DEFAULT_CFG``, with or without its suffix,
in any case), a preset of ``modelopt.recipe.presets`` (``nvfp4``), a PTQ recipe of the ``modelopt_recipes`` library
(``general/ptq/nvfp4_default-kv_fp8``) or the path of a recipe file, both with or without ``.yaml``.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common.base_model import import_modelopt
from sglang_modelopt_ext.workflow.quantize.library import (
    PTQ,
    find_file,
    first_line,
    library,
    load,
    quiet,
    without_suffix,
)

_CONFIG_SUFFIXES = ("_CFG", "_CONFIG")
NONE = "none"
"""The value of ``--recipe`` without quantized layers, and of ``--kv`` without a quantized KV cache."""

SMOOTHQUANT, FP8_SMOOTHQUANT = "smoothquant", "fp8_smoothquant"
ALGORITHMS = ("max", "awq_lite", "awq_clip", "awq_full", SMOOTHQUANT, "svdquant", "mse", "local_hessian")
"""Values of ``--calibration-algorithm``."""

_TRAINED = ("lsq",)
FROM_QUANTIZED = "get_qdq_activations_from_prev_layer"
"""The one option of ModelOpt's ``layerwise`` that changes the result: whether a layer's input is that of the quantized model."""

_UNCHANGED: dict[str, Any] = {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"}
_NEAREST = 4


@dataclass(frozen=True)
class Changes:
    """The user's changes to a recipe.

    Attributes:
        kv: name of a KV preset; :data:`NONE` for none; None keeps the recipe's.
        algorithm: replaces the recipe's calibration algorithm.
        alpha: SmoothQuant's.
        overrides: ``key=value``, such as ``algorithm.alpha_step=0.05`` or ``quant_cfg.1.enable=false``.
    """

    kv: str | None = None
    algorithm: str | None = None
    alpha: float | None = None
    overrides: tuple[str, ...] = ()


def configurations() -> dict[str, dict[str, Any]]:
    """Return the configurations of ``modelopt.torch.quantization`` that quantize layers, by name without suffix."""
    mtq = import_modelopt()
    names = {_stem(name): name for name in sorted(mtq.config.choices)}
    return {stem: getattr(mtq, name) for stem, name in names.items() if not stem.endswith(("_KV", "_KV_ROTATE"))}


def presets() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return ModelOpt's presets for layers and for KV caches, by name."""
    import_modelopt()
    with quiet():
        from modelopt.recipe.presets import KV_QUANT_CFG_CHOICES, QUANT_CFG_CHOICES

    return QUANT_CFG_CHOICES, KV_QUANT_CFG_CHOICES


def find_recipe(name: str) -> tuple[str, dict[str, Any]]:
    """Return the name to record, and a copy of the configuration of that name.

    Raises:
        ModelOptExtError: an unknown name (the message has the nearest known ones), or an invalid recipe file.
    """
    if name.lower() == NONE:
        return NONE, copy.deepcopy(_UNCHANGED)
    known = configurations()
    if (stem := _stem(name.upper())) in known:
        return stem, copy.deepcopy(known[stem])
    models, _ = presets()
    if name.lower() in models:
        return name.lower(), copy.deepcopy(models[name.lower()])
    if find_file(name) is not None or without_suffix(name) != name:
        recorded, recipe = load(name, PTQ)
        return recorded, recipe.quantize.model_dump(exclude_unset=True)
    raise _unknown("--recipe", name, [*known, *models, *library(), NONE])


def find_kv(name: str) -> list[dict[str, Any]]:
    """Return the entries that a KV preset adds to a configuration. Raises ModelOptExtError for an unknown name."""
    _, caches = presets()
    if name not in caches:
        raise _unknown("--kv", name, [*caches, NONE])
    return list(copy.deepcopy(caches[name])["quant_cfg"])


def build(config: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """Return a recipe's configuration with the user's changes, and its ``algorithm`` as a list of full options.

    Raises:
        ModelOptExtError: an unknown KV preset or algorithm, an option without its algorithm, or an override that
            ModelOpt does not accept.
    """
    built = {"quant_cfg": list(copy.deepcopy(config["quant_cfg"])), "algorithm": _steps(config.get("algorithm"))}
    if changes.kv == NONE:
        built["quant_cfg"].append({"quantizer_name": "*_bmm_quantizer", "enable": False})
    elif changes.kv is not None:
        built["quant_cfg"] += find_kv(changes.kv)
        # The scales of a KV cache need calibration even where those of the layers do not.
        built["algorithm"] = built["algorithm"] or [{"method": "max"}]
    if changes.algorithm is not None:
        built["algorithm"] = [_replaced(built["algorithm"], changes.algorithm)]
    if changes.alpha is not None:
        _set_alpha(built["algorithm"], changes.alpha)
    if changes.overrides:
        built = _overridden(built, changes.overrides)
    built["algorithm"] = [complete_step(step) for step in built["algorithm"]]
    return built


def complete_step(step: Mapping[str, Any]) -> dict[str, Any]:
    """Return a calibration step with all of its options.

    Of ``layerwise`` it has whether a recipe that goes layer by layer gives a layer the quantized model's activations. The rest
    changes no result: the run decides whether and where progress is kept.

    Raises:
        ModelOptExtError: an unknown method or option, or a method that needs training.
    """
    from modelopt.torch.quantization.mode import CalibrateModeRegistry

    method = step.get("method")
    if method in _TRAINED:
        raise ModelOptExtError.at("recipe", "algorithm", "one that needs no training", method)
    name = f"{method}_calibrate"
    if not method or name not in CalibrateModeRegistry:
        raise _unknown("--calibration-algorithm", str(method), ALGORITHMS)
    try:
        full = CalibrateModeRegistry[name].config_class(**step)
    except ValueError as error:
        raise ModelOptExtError.at("recipe", "algorithm", f"options of {method}", first_line(error)) from error
    options: dict[str, Any] = full.model_dump(exclude={"layerwise"})
    if full.layerwise.enable and getattr(full.layerwise, FROM_QUANTIZED):
        options["layerwise"] = {"enable": True, FROM_QUANTIZED: True}
    return {key: value for key, value in options.items() if value is not None}


def _stem(name: str) -> str:
    """Return the name of a configuration without its suffix."""
    for suffix in _CONFIG_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _unknown(flag: str, name: str, known: Sequence[str]) -> ModelOptExtError:
    """Return the error for an unknown name, with the nearest known ones by lower-case spelling."""
    spelling = {entry.lower(): entry for entry in known}
    near = difflib.get_close_matches(name.lower(), spelling, _NEAREST, cutoff=0.0)
    nearest = ", ".join(dict.fromkeys(spelling[entry] for entry in near))
    return ModelOptExtError.at(flag, name, f"a known name, such as {nearest} (--list shows all)", "no such name")


def _steps(algorithm: Any) -> list[dict[str, Any]]:
    """Return a configuration's algorithm, in any of its spellings, as a list of steps; empty for none."""
    if algorithm is None:
        return []
    parts = algorithm if isinstance(algorithm, list) else [algorithm]
    return [{"method": part} if isinstance(part, str) else dict(part) for part in parts if part is not None]


def _replaced(steps: Sequence[Mapping[str, Any]], method: str) -> dict[str, Any]:
    """Return the step for ``method``, with the recipe's options if it is the recipe's own."""
    if method not in ALGORITHMS:
        raise _unknown("--calibration-algorithm", method, ALGORITHMS)
    own = [step for step in steps if step.get("method") == method]
    return dict(own[0]) if own else {"method": method}


def _set_alpha(steps: list[dict[str, Any]], alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ModelOptExtError.at("command line", "--alpha", "a number from 0 to 1", alpha)
    smoothing = [step for step in steps if step.get("method") == SMOOTHQUANT]
    if not smoothing:
        methods = ", ".join(str(step.get("method")) for step in steps) or NONE
        raise ModelOptExtError.at("command line", "--alpha", "smoothquant as calibration algorithm", methods)
    for step in smoothing:
        step["alpha"] = alpha


def _overridden(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    from modelopt.torch.quantization.config import QuantizeConfig
    from omegaconf import OmegaConf

    steps = config["algorithm"]
    # A single step, the usual case, is addressed without a number.
    changed = OmegaConf.create({**config, "algorithm": steps[0] if len(steps) == 1 else steps})
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.strip().removeprefix("quantize.")
        if not equals or key.partition(".")[0] not in ("algorithm", "quant_cfg"):
            raise ModelOptExtError.at(
                "command line", "--override", "algorithm.OPTION=VALUE or quant_cfg.NUMBER.FIELD=VALUE", override
            )
        try:
            OmegaConf.update(changed, key, OmegaConf.from_dotlist([f"value={value}"])["value"], merge=True)
        except Exception as error:  # OmegaConf has an exception for every kind of wrong key
            raise ModelOptExtError.at("command line", "--override", "a field of the recipe", override) from error
    content: Any = OmegaConf.to_container(changed, resolve=False)
    try:
        checked = QuantizeConfig(quant_cfg=content["quant_cfg"]).model_dump(exclude_unset=True)
    except ValueError as error:
        raise ModelOptExtError.at("command line", "--override", "values ModelOpt takes", first_line(error)) from error
    return {"quant_cfg": list(checked["quant_cfg"]), "algorithm": _steps(content["algorithm"])}
