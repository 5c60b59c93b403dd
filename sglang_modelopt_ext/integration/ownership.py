"""Whose checkpoint is it: ours, SGLang's own, or nobody's. No SGLang is imported here."""

from __future__ import annotations

from pathlib import Path

import torch

from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME, QuantConfig, read_quant_config
from sglang_modelopt_ext.checkpoint.tensors import read_headers, read_json_object
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import PRE_QUANT_SCALE
from sglang_modelopt_ext.schemes.table import FAMILIES, MIXED_PRECISION, SCHEMES, UMBRELLA, find_scheme

GENERIC_FLAG = "modelopt"
"""SGLang's flag for "whatever ModelOpt wrote"."""

STOCK_MIXED_FLAG = "modelopt_mixed"
STOCK_W4AFP8_FLAG = "w4afp8"
"""What SGLang calls mixtures of experts with INT4 weights and FP8 activations; their MIXED_PRECISION is not ours."""

STOCK_MODELOPT_FLAGS = frozenset({"modelopt_fp4", "modelopt_fp8", STOCK_MIXED_FLAG})
"""SGLang's flags for ModelOpt's checkpoints; on one of another kind each is a mistake."""

STOCK_MIXED_ALGOS = frozenset({"NVFP4", "W4A16_NVFP4", "FP8"})
"""What SGLang 0.5.23 reads rightly in a mix, as long as one layer is NVFP4."""

ATTENTION_LAYER = "model.layers.0.self_attn.q_proj"
"""The layer that tells whether a model's attention is quantized."""

STOCK_GROUP_SIZE = 16
"""The only NVFP4 group size SGLang 0.5.23 serves."""


def gpu_capability() -> int | None:
    """Compute capability times ten of the visible GPU, None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def owned_family(folder: Path, flag: str | None, capability: int | None) -> tuple[str, QuantConfig] | None:
    """The ``--quantization`` family under which this plugin serves the checkpoint in ``folder``.

    Args:
        folder: where ``config.json`` and ``hf_quant_config.json`` are.
        flag: the value of ``--quantization``, None when it was not given.
        capability: the GPU's compute capability times ten, None on a CPU.

    Returns:
        The family and the checkpoint's configuration, or None when the checkpoint is left to SGLang.

    Raises:
        ModelOptExtError: an algorithm nobody knows, or a flag and a checkpoint that do not fit.
    """
    if flag == STOCK_W4AFP8_FLAG:
        return None
    config = read_quant_config(folder)
    if config is not None and config.algo is None and config.kv_cache_algo is not None:
        return _kv_cache_only(config, flag)
    if config is None or config.algo is None:
        if flag in FAMILIES:
            raise ModelOptExtError.at(
                folder, f"--quantization {flag}", "a checkpoint quantized by ModelOpt", "an unquantized one"
            )
        return None
    family, stock_flag = _flags(config)
    if flag not in (None, GENERIC_FLAG, UMBRELLA, family, stock_flag):
        if stock_flag is not None and flag not in FAMILIES and flag not in STOCK_MODELOPT_FLAGS:
            return None  # such as nvfp4_online or quark_mxfp4: SGLang requantizes what it can read
        fitting = " or ".join(
            f"--quantization {name}" for name in dict.fromkeys((family, UMBRELLA, stock_flag)) if name
        )
        raise ModelOptExtError.at(
            config.file,
            "quant_algo",
            f"an algorithm of --quantization {flag}",
            f"{config.algo}, which {fitting} serves",
        )
    if flag not in FAMILIES and stock_serves(config, folder, capability):
        return None
    return (UMBRELLA if flag == UMBRELLA else family), config


def _kv_cache_only(config: QuantConfig, flag: str | None) -> tuple[str, QuantConfig]:
    """A checkpoint that quantizes nothing but its KV cache, which SGLang refuses for want of a ``quant_algo``."""
    if flag not in (None, GENERIC_FLAG, UMBRELLA):
        raise ModelOptExtError.at(
            config.file,
            "quant_algo",
            f"an algorithm of --quantization {flag}",
            f"null: only the KV cache is quantized, which --quantization {UMBRELLA} serves",
        )
    return UMBRELLA, config


def _flags(config: QuantConfig) -> tuple[str, str | None]:
    """Our family and SGLang's own flag for a checkpoint; raises ModelOptExtError for an algorithm nobody knows."""
    if config.algo == MIXED_PRECISION:
        if not config.quantized_layers:
            raise ModelOptExtError.at(
                config.file, "quantized_layers", "the algorithm of every layer of the mix", "none"
            )
        for name, layer in config.quantized_layers.items():
            find_scheme(layer.algo, f"{config.file}: quantized_layers.{name}")
        return UMBRELLA, STOCK_MIXED_FLAG
    scheme = find_scheme(config.algo or "", config.file)
    return scheme.flag, scheme.stock_flag


def stock_serves(config: QuantConfig, folder: Path, capability: int | None) -> bool:
    """Whether SGLang 0.5.23 itself serves the checkpoint rightly on a GPU of that capability."""
    if capability is None:
        return False
    layers = list(config.quantized_layers.values())
    algos = {layer.algo for layer in layers} if config.algo == MIXED_PRECISION else {config.algo or ""}
    if config.algo == MIXED_PRECISION and (not algos <= STOCK_MIXED_ALGOS or algos == {"FP8"}):
        return False
    rows = [SCHEMES[algo] for algo in algos]
    if any(row.stock_capability is None or capability < row.stock_capability for row in rows):
        return False
    group_sizes = {layer.group_size for layer in layers} | {config.group_size}
    if any(size not in (None, STOCK_GROUP_SIZE) for size in group_sizes):
        return False
    # SGLang gives all layers of an expert one method, and asserts on a Mixtral whose attention is not quantized.
    if _mixes_an_expert(config) or (not config.layer(ATTENTION_LAYER) and _model_type(folder) == "mixtral"):
        return False
    # SGLang multiplies by pre_quant_scale for NVFP4_AWQ alone; elsewhere it would be dropped.
    if algos == {"NVFP4_AWQ"} or not any(folder.glob("*.safetensors")):  # a hub model that is not downloaded yet
        return True
    return not any(name.endswith(f".{PRE_QUANT_SCALE.name}") for name in read_headers(folder))


def _mixes_an_expert(config: QuantConfig) -> bool:
    """Whether the experts of a layer have projections of different algorithms."""
    algos: dict[str, set[str]] = {}
    for name, layer in config.quantized_layers.items():
        block, experts, _ = name.partition(".experts.")
        if experts:
            algos.setdefault(block, set()).add(layer.algo)
    return any(len(found) > 1 for found in algos.values())


def _model_type(folder: Path) -> str | None:
    file = folder / CONFIG_NAME
    value = read_json_object(file).get("model_type") if file.exists() else None
    return value if isinstance(value, str) else None
