"""The decision who serves a checkpoint: this package, SGLang, or neither. No SGLang is imported here.

It is tolerant on purpose: a checkpoint that SGLang may serve is never an error of this package. One that is not wholly understood
is left to SGLang, with the reason. Strictness begins once this package serves it: by a flag of its own, or because nothing else
serves its algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_modelopt_ext.checkpoint.quant_config import (
    CONFIG_NAME,
    QUANT_CONFIG_NAME,
    QuantConfig,
    is_modelopt_section,
    quantization_sections,
    read_quant_config,
)
from sglang_modelopt_ext.checkpoint.stock import MIX_ALGOS, NVFP4_ALGOS, stock_fault, stores_stock_scales
from sglang_modelopt_ext.checkpoint.tensors import read_json_object
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.table import FAMILIES, MIXED_PRECISION, SCHEMES, UMBRELLA, find_scheme
from sglang_modelopt_ext.schemes.versions import described_sglang

GENERIC_FLAG = "modelopt"
"""SGLang's flag for any checkpoint of ModelOpt."""

STOCK_MIXED_FLAG = "modelopt_mixed"
STOCK_W4AFP8_FLAG = "w4afp8"
"""SGLang's flag for mixtures of experts with INT4 weights and FP8 activations, whose MIXED_PRECISION is not this package's."""

MXFP8, STOCK_MXFP8_FLAG = "MXFP8", "mxfp8"
"""An algorithm that SGLang reads under another name, and that name."""

NO_FLAGS = (None, "unquant")
"""The values that stand for no ``--quantization``: SGLang resolves ``unquant`` to None, and still reads the checkpoint's."""

REQUANTIZING_FLAGS = frozenset({"nvfp4_online", "quark_mxfp4", STOCK_W4AFP8_FLAG})
"""SGLang's flags that ask for another format than the checkpoint's. It corrects every other flag to the checkpoint's."""


SERVED_DEVICES = "cuda (NVIDIA) or cpu"
"""The values of ``--device`` that this package has kernels for."""


@dataclass(frozen=True)
class Ownership:
    """The decision who serves a checkpoint, with the reason.

    Attributes:
        family: the ``--quantization`` family of this package, None where the checkpoint is left to SGLang.
        config: the checkpoint's declaration, None where it is not ModelOpt's or was not understood.
        why: the reason, one clause; empty for a model that ModelOpt did not quantize.
        in_doubt: whether it is left to SGLang because it was not wholly understood.
    """

    family: str | None
    config: QuantConfig | None = None
    why: str = ""
    in_doubt: bool = False


def owned_family(folder: Path, flag: str | None, device: Device) -> tuple[str, QuantConfig] | None:
    """Return the family and configuration under which this package serves a checkpoint, None where it is left to SGLang.

    Arguments and errors are those of :func:`decide`.
    """
    found = decide(folder, flag, device)
    return None if found.family is None or found.config is None else (found.family, found.config)


def decide(folder: Path, flag: str | None, device: Device) -> Ownership:
    """Decide who serves the checkpoint in ``folder``.

    Args:
        folder: where ``config.json`` and ``hf_quant_config.json`` are.
        flag: the value of ``--quantization``, None when it was not given.
        device: the device that is to serve it.

    Raises:
        ModelOptExtError: a flag of this package does not fit the checkpoint or the device; or the checkpoint's algorithm is one
            that SGLang serves nowhere, and the checkpoint is malformed or does not fit the flag.
    """
    if flag in REQUANTIZING_FLAGS:
        return Ownership(None)
    flag = None if flag in NO_FLAGS else flag
    other = device.kind == "other"
    if other and flag in FAMILIES:
        expected = f"{SERVED_DEVICES} with --quantization {flag}"
        raise ModelOptExtError.at("command line", "--device", expected, device.name)
    try:
        config = read_quant_config(folder)
        _check_algorithms(config)
    except ModelOptExtError as error:
        if flag in FAMILIES or (not other and _is_only_ours(folder)):
            raise
        return Ownership(None, why=str(error), in_doubt=True)
    if config is None or (config.algo is None and config.kv_cache_algo is None):
        if flag in FAMILIES:
            raise ModelOptExtError.at(
                folder, f"--quantization {flag}", "a checkpoint quantized by ModelOpt", "an unquantized one"
            )
        return Ownership(None)
    if other:
        return Ownership(None, config, f"this package has no kernels for {device.name}")
    if config.algo is None:
        return _kv_cache_only(config, flag)
    if flag in FAMILIES:
        return _asked_for(config, flag)
    if config.algo == MIXED_PRECISION:
        corrected = any(layer.algo in NVFP4_ALGOS for layer in config.quantized_layers.values())
        if not corrected and flag not in (None, GENERIC_FLAG, STOCK_MIXED_FLAG):
            raise _misfit(config, str(flag))
        return _judged(UMBRELLA, config, folder, device)
    scheme = find_scheme(config.algo, config.file)
    if scheme.stock_flag is not None:
        return _judged(scheme.flag, config, folder, device)
    if scheme.algo == MXFP8:
        if stores_stock_scales(folder):
            return Ownership(None, config, "its block scales have SGLang's own name")
        if flag == STOCK_MXFP8_FLAG:
            return _judged(scheme.flag, config, folder, device)
    if flag not in (None, GENERIC_FLAG):
        raise _misfit(config, str(flag))
    return _judged(scheme.flag, config, folder, device)


def _judged(family: str, config: QuantConfig, folder: Path, device: Device) -> Ownership:
    """Return ``family``, unless SGLang serves the checkpoint correctly or it has an algorithm that only SGLang knows."""
    unknown = sorted({layer.algo for layer in config.quantized_layers.values()} - SCHEMES.keys())
    if unknown:
        return Ownership(None, config, f"{', '.join(unknown)} in a mix is SGLang's own")
    fault = stock_fault(config, folder, device)
    if fault is None:
        return Ownership(None, config, f"SGLang {described_sglang()} serves {config.algo} there")
    if config.algo == MIXED_PRECISION and stores_stock_scales(folder):
        return Ownership(None, config, "its block scales have SGLang's own name")
    return Ownership(family, config, f"SGLang {described_sglang()} does not: {fault}")


def _asked_for(config: QuantConfig, flag: str | None) -> Ownership:
    """Return ``flag`` as the family. Raises ModelOptExtError where it does not fit or the checkpoint has an unknown algorithm."""
    for name, layer in config.quantized_layers.items():
        find_scheme(layer.algo, f"{config.file}: quantized_layers.{name}")
    family = UMBRELLA if config.algo == MIXED_PRECISION else find_scheme(config.algo or "", config.file).flag
    if flag not in (family, UMBRELLA):
        raise _misfit(config, str(flag))
    return Ownership(flag, config, f"--quantization {flag} asks for it")


def _kv_cache_only(config: QuantConfig, flag: str | None) -> Ownership:
    """Return the owner of a checkpoint that quantizes only its KV cache. SGLang rejects it, or serves it with a plain cache."""
    if flag in (None, GENERIC_FLAG, UMBRELLA):
        why = f"it quantizes its KV cache only, for which SGLang {described_sglang()} has no quant_algo"
        return Ownership(UMBRELLA, config, why)
    if flag in FAMILIES:
        raise ModelOptExtError.at(
            config.file,
            "quant_algo",
            f"an algorithm of --quantization {flag}",
            f"null: only the KV cache is quantized, which --quantization {UMBRELLA} serves",
        )
    return Ownership(None, config, f"--quantization {flag} is SGLang's")


def _misfit(config: QuantConfig, flag: str) -> ModelOptExtError:
    """Return the error for a flag that does not fit; it names those that do."""
    if config.algo == MIXED_PRECISION:
        names: tuple[str | None, ...] = (UMBRELLA, STOCK_MIXED_FLAG)
    else:
        scheme = find_scheme(config.algo or "", config.file)
        names = (scheme.flag, UMBRELLA, scheme.stock_flag)
    fitting = " or ".join(f"--quantization {name}" for name in dict.fromkeys(names) if name)
    return ModelOptExtError.at(
        config.file,
        "quant_algo",
        f"an algorithm of --quantization {flag}",
        f"{config.algo}, which {fitting} serves",
    )


def _check_algorithms(config: QuantConfig | None) -> None:
    """Raise ModelOptExtError for an algorithm unknown to the scheme table and to SGLang's mixes, and for a mix without layers."""
    if config is None or config.algo is None:
        return
    if config.algo != MIXED_PRECISION:
        find_scheme(config.algo, config.file)
        return
    if not config.quantized_layers:
        raise ModelOptExtError.at(config.file, "quantized_layers", "the algorithm of every layer of the mix", "none")
    for name, layer in config.quantized_layers.items():
        if layer.algo not in MIX_ALGOS:
            find_scheme(layer.algo, f"{config.file}: quantized_layers.{name}")


def _is_only_ours(folder: Path) -> bool:
    """Return whether SGLang serves none of the algorithms that a checkpoint names, however malformed the rest is."""
    stated = list(_stated_algorithms(folder))
    return bool(stated) and all(
        isinstance(algo, str)
        and (scheme := SCHEMES.get(algo.upper())) is not None
        and scheme.stock_flag is None
        and scheme.algo != MXFP8
        for algo in stated
    )


def _stated_algorithms(folder: Path) -> Iterator[object]:
    """Yield the ``quant_algo`` of both files, and None for a section that is not ModelOpt's."""
    for name in (QUANT_CONFIG_NAME, CONFIG_NAME):
        try:
            content = read_json_object(folder / name)
        except ModelOptExtError:
            continue
        sections = [content] if name == QUANT_CONFIG_NAME else quantization_sections(content)[:1]
        for outer in sections:
            section = outer.get("quantization", outer) if isinstance(outer, Mapping) else None
            ours = name == QUANT_CONFIG_NAME or is_modelopt_section(outer)
            if not isinstance(section, Mapping) or not ours:
                yield None
            elif "quant_algo" in section:
                yield section["quant_algo"]
