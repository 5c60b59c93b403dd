"""Whose checkpoint is it: ours, SGLang's own, or nobody's. No SGLang is imported here."""

from __future__ import annotations

from pathlib import Path

from sglang_modelopt_ext.checkpoint.quant_config import QuantConfig, read_quant_config
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.table import FAMILIES, SCHEMES, STOCK_FLAGS, UMBRELLA, fitting_flag, is_known

GENERIC_FLAG = "modelopt"
"""SGLang's flag for "whatever ModelOpt wrote"."""


def owned_family(folder: Path, flag: str | None) -> tuple[str, QuantConfig] | None:
    """The ``--quantization`` family under which this plugin serves the checkpoint in ``folder``.

    Args:
        folder: where ``config.json`` and ``hf_quant_config.json`` are.
        flag: the value of ``--quantization``, None when it was not given.

    Returns:
        The family and the checkpoint's configuration, or None when the checkpoint is left to SGLang.

    Raises:
        ModelOptExtError: an algorithm nobody knows, a flag and a checkpoint that do not fit, or a combination not served.
    """
    config = read_quant_config(folder)
    if config is None:
        if flag in FAMILIES:
            raise ModelOptExtError.at(
                folder, f"--quantization {flag}", "a checkpoint exported by ModelOpt", "an unquantized one"
            )
        return None
    if config.algo is not None and not is_known(config.algo):
        known = ", ".join(sorted(SCHEMES.keys() | STOCK_FLAGS.keys()))
        raise ModelOptExtError.at(config.file, "quant_algo", f"one of {known}", config.algo)
    scheme = SCHEMES.get(config.algo or "")
    if scheme is None:
        if flag in FAMILIES:
            raise ModelOptExtError.at(
                config.file, "quant_algo", f"one of {_accepted(flag)}, for --quantization {flag}", _advice(config)
            )
        return None
    if flag not in (None, GENERIC_FLAG, scheme.flag, UMBRELLA):
        raise ModelOptExtError.at(config.file, "quant_algo", f"an algorithm of --quantization {flag}", _advice(config))
    _check_served(config)
    return (UMBRELLA if flag == UMBRELLA else scheme.flag), config


def _accepted(flag: str) -> str:
    return ", ".join(sorted(FAMILIES[flag])) or "none yet"


def _advice(config: QuantConfig) -> str:
    if config.algo is None:
        return "null (only the KV cache is quantized)"
    fitting = fitting_flag(config.algo)
    return f"{config.algo}, which {'--quantization ' + fitting if fitting else 'nothing'} serves"


def _check_served(config: QuantConfig) -> None:
    if config.kv_cache_algo is not None:
        raise ModelOptExtError.at(
            config.file, "kv_cache_quant_algo", "null: quantized KV caches are not served yet", config.kv_cache_algo
        )
