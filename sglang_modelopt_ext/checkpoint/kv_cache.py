"""The KV cache a checkpoint asks for: its recipe, and the scales and biases of every attention layer.

What an export says, and what only its tensors show:

- ``kv_cache_quant_algo`` is FP8, NVFP4 or NVFP4_AFFINE. FP8 with ``k_bias`` and ``v_bias`` is the affine preset.
- A rotated NVFP4 cache is exported as NVFP4; this package records ``kv_cache_recipe`` under its own key, and
  ``--kv-cache-dtype modelopt_nvfp4_rotate`` says it for other exports.
- Exports in Hugging Face's naming store ``k_proj.k_scale`` = amax / 448 for both formats. Exports of Megatron models store
  ``self_attn.k_scale``: amax / 448 for FP8 and amax / 2688 for NVFP4 (``get_scaling_factor`` in ``torch/export/quant_utils.py``).
- The ``_cast`` presets store no scales: amax is 448.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sglang_modelopt_ext.checkpoint.quant_config import (
    CONFIG_NAME,
    KV_CACHE_RECIPE,
    OWN_KEY,
    QuantConfig,
    canonical_name,
    text_config,
)
from sglang_modelopt_ext.checkpoint.reader import KV_CACHE_NAMES, is_kv_cache_tensor
from sglang_modelopt_ext.checkpoint.tensors import StoredTensor, read_headers, read_tensors
from sglang_modelopt_ext.checkpoint.values import check_values
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_kernels.formats.base import ValueRule
from sglang_modelopt_kernels.formats.e4m3 import MAX as E4M3_MAX
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES, KVRecipe

FLAG_PREFIX = "modelopt_"
KV_FLAGS: dict[str, KVRecipe] = {FLAG_PREFIX + name: recipe for name, recipe in KV_RECIPES.items()}
"""Our values of ``--kv-cache-dtype``."""

UNQUANTIZED_KV = ("bf16", "bfloat16")
"""Values of ``--kv-cache-dtype`` that leave a checkpoint's KV cache quantization unused."""

STOCK_FP8_KV = "fp8_e4m3"
STOCK_FLAGS: dict[str, str] = {STOCK_FP8_KV: "fp8", "nvfp4": "nvfp4"}
"""SGLang's own flags and the recipe each is."""

KV_ALGOS: dict[str, tuple[str, ...]] = {
    "FP8": ("fp8", "fp8_affine"),
    "NVFP4": ("nvfp4", "nvfp4_rotate"),
    "NVFP4_AFFINE": ("nvfp4_affine",),
}
"""``kv_cache_quant_algo`` and the recipes that are exported under it, the usual one first."""

CAST_AMAX = 448.0
"""What the ``_cast`` presets, and a cache quantized by flag alone, take for the largest magnitude."""

_PROJECTIONS = ("k_proj", "v_proj")


@dataclass(frozen=True)
class KVLayer:
    """The static numbers of one attention layer.

    Attributes:
        k_scale, v_scale: amax / range of the recipe's format.
        k_bias, v_bias: float32 ``[H_kv, D]``, of all ranks, or None.
    """

    k_scale: float
    v_scale: float
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None


@dataclass(frozen=True)
class KVCachePlan:
    """How the KV cache of a model is quantized.

    Attributes:
        recipe: the formats and what is done around them.
        source: where its scales are from, for the log.
        layers: by :func:`canonical_name` of the attention module; empty when every layer has the scale of an amax of 448.
    """

    recipe: KVRecipe
    source: str
    layers: Mapping[str, KVLayer] = field(default_factory=dict)

    def layer(self, module: str) -> KVLayer:
        """The numbers of the attention module of that name. Raises ModelOptExtError when the checkpoint has none for it."""
        if not self.layers:
            scale = CAST_AMAX / self.recipe.format.range
            return KVLayer(scale, scale)
        found = self.layers.get(canonical_name(module))
        if found is None:
            raise ModelOptExtError.at(
                module, "k_scale", "KV cache scales for every attention layer, or for none", "none for this one"
            )
        return found


def kv_cache_plan(folder: Path, config: QuantConfig | None, flag: str) -> KVCachePlan | None:
    """How the model in ``folder`` is to be cached under ``--kv-cache-dtype flag``; None where it is SGLang's own business.

    Args:
        folder: the checkpoint; a hub model that is not downloaded yet has no tensors there, and its FP8 is taken for plain.
        config: what it declares, None when ModelOpt did not write it.
        flag: the flag's value, ``auto`` when it was not given.

    Raises:
        ModelOptExtError: the flag contradicts the checkpoint, or its tensors do not fit what it declares.
    """
    wanted = KV_FLAGS.get(flag)
    declared = config.kv_cache_algo if config is not None else None
    if config is None or declared is None:
        return _cast_plan(wanted, flag) if wanted else None
    if flag in UNQUANTIZED_KV:
        return None
    recipes = _declared_recipes(config)
    tensors = read_headers(folder) if any(folder.glob("*.safetensors")) else {}
    stored = {name: tensor for name, tensor in tensors.items() if is_kv_cache_tensor(name)}
    recipe = _recipe(config, recipes, stored)
    if recipe.name == "fp8" and is_latent(folder):
        return None
    if wanted is not None and wanted.name in recipes and wanted.affine == recipe.affine:
        recipe = wanted
    elif flag not in ("auto", FLAG_PREFIX + recipe.name) and STOCK_FLAGS.get(flag) != recipe.name:
        fitting = sorted(FLAG_PREFIX + name for name in recipes if KV_RECIPES[name].affine == recipe.affine)
        raise ModelOptExtError.at(
            "command line",
            "--kv-cache-dtype",
            f"auto, {', '.join(fitting)} or bf16 for a KV cache calibrated as {declared} ({config.file.name})",
            flag,
        )
    layers = _read_layers(config, recipe, tensors, stored)
    _check_heads(folder, recipe, layers)
    return KVCachePlan(recipe, _source(config, recipe, stored), layers)


def _cast_plan(recipe: KVRecipe, flag: str) -> KVCachePlan:
    if recipe.affine:
        raise ModelOptExtError.at(
            "command line", "--kv-cache-dtype", "a recipe without biases: this checkpoint stores none", flag
        )
    return KVCachePlan(recipe, f"--kv-cache-dtype, amax {CAST_AMAX:g}")


def _declared_recipes(config: QuantConfig) -> tuple[str, ...]:
    recipes = KV_ALGOS.get(config.kv_cache_algo or "")
    if recipes is None:
        raise ModelOptExtError.at(
            config.file, "kv_cache_quant_algo", f"null or one of {', '.join(KV_ALGOS)}", config.kv_cache_algo
        )
    if config.kv_cache_recipe is not None and config.kv_cache_recipe not in recipes:
        raise ModelOptExtError.at(
            config.file,
            f"{OWN_KEY}.{KV_CACHE_RECIPE}",
            f"{' or '.join(recipes)} for {config.kv_cache_algo}",
            config.kv_cache_recipe,
        )
    return recipes


def _recipe(config: QuantConfig, recipes: tuple[str, ...], stored: Mapping[str, StoredTensor]) -> KVRecipe:
    bias = next((name for name in sorted(stored) if name.endswith("_bias")), None)
    recipe = KV_RECIPES[config.kv_cache_recipe or recipes[0]]
    if bias is not None and not recipe.affine:
        affine = next((KV_RECIPES[name] for name in recipes if KV_RECIPES[name].affine), None)
        if affine is None or config.kv_cache_recipe is not None:
            raise ModelOptExtError.at(stored[bias].file, bias, f"no biases for {config.kv_cache_algo}", "one")
        return affine
    return recipe


def _owner(tensor: str) -> str:
    """The attention module a KV tensor belongs to."""
    module = tensor.rpartition(".")[0]
    return module.rpartition(".")[0] if module.rpartition(".")[2] in _PROJECTIONS else module


def _is_megatron(tensor: str) -> bool:
    return tensor.rpartition(".")[0].rpartition(".")[2] not in _PROJECTIONS


def _source(config: QuantConfig, recipe: KVRecipe, stored: Mapping[str, StoredTensor]) -> str:
    if not stored:
        return f"{config.file.name}, no scales stored, amax {CAST_AMAX:g}"
    divisor = _divisor(recipe, next(iter(stored)))
    return f"{config.file.name}, scales read as amax / {divisor:g}"


def _divisor(recipe: KVRecipe, tensor: str) -> float:
    """What amax was divided by in a stored scale."""
    return recipe.format.range if _is_megatron(tensor) else E4M3_MAX


def _read_layers(
    config: QuantConfig, recipe: KVRecipe, tensors: Mapping[str, StoredTensor], stored: Mapping[str, StoredTensor]
) -> dict[str, KVLayer]:
    owners: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        owners.setdefault(_owner(name), {})[name.rpartition(".")[2]] = tensor
    if not owners:
        if recipe.affine and tensors:
            raise ModelOptExtError.at(config.file, "kv_cache_quant_algo", "k_bias and v_bias tensors for it", "none")
        return {}
    wanted = sorted(KV_CACHE_NAMES if recipe.affine else {name for name in KV_CACHE_NAMES if name.endswith("_scale")})
    attention = {_owner(name) for name in tensors if name.endswith(".k_proj.weight")}
    for owner in sorted(attention | owners.keys()):
        found = owners.get(owner, {})
        for name in wanted:
            if name not in found:
                some = next(iter(stored.values()))
                raise ModelOptExtError.at(some.file, f"{owner}: {name}", "one for every attention layer", "none")
    return {canonical_name(owner): _read_layer(recipe, found) for owner, found in owners.items()}


def _read_layer(recipe: KVRecipe, found: Mapping[str, StoredTensor]) -> KVLayer:
    scales, biases = {}, {}
    for stored, tensor in read_tensors(list(found.values())):
        name = stored.name.rpartition(".")[2]
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ModelOptExtError.at(stored.file, stored.name, "16-bit or 32-bit floats", tensor.dtype)
        if name.endswith("_scale"):
            if tensor.numel() != 1:
                raise ModelOptExtError.at(stored.file, stored.name, "one value", f"shape {list(tensor.shape)}")
            check_values(stored.file, stored.name, tensor, ValueRule.POSITIVE)
            # In double precision and rounded once: the stored scale is itself a rounded quotient.
            scales[name] = float(tensor) * _divisor(recipe, stored.name) / recipe.format.range
        else:
            if tensor.dim() != 4 or (tensor.shape[0], tensor.shape[2]) != (1, 1):
                raise ModelOptExtError.at(
                    stored.file, stored.name, "shape [1, KV heads, 1, head_dim]", list(tensor.shape)
                )
            check_values(stored.file, stored.name, tensor, ValueRule.FINITE)
            biases[name] = tensor[0, :, 0].to(torch.float32)
    return KVLayer(scales["k_scale"], scales["v_scale"], biases.get("k_bias"), biases.get("v_bias"))


def is_latent(folder: Path) -> bool:
    """Whether the model caches latent vectors (MLA), which have one scale and are SGLang's own business."""
    return text_config(folder).get("kv_lora_rank") is not None


def _check_heads(folder: Path, recipe: KVRecipe, layers: Mapping[str, KVLayer]) -> None:
    """Head counts and sizes against config.json, where it states them."""
    fields = text_config(folder)
    queries = fields.get("num_attention_heads")
    heads = fields.get("num_key_value_heads") or queries
    head_dim = fields.get("head_dim")
    if head_dim is None and isinstance(queries, int) and isinstance(fields.get("hidden_size"), int):
        head_dim = fields["hidden_size"] // queries
    if not isinstance(head_dim, int) or not isinstance(heads, int):
        return
    check_head_dim(recipe, head_dim, folder / CONFIG_NAME)
    for name, layer in layers.items():
        for side, bias in (("k_bias", layer.k_bias), ("v_bias", layer.v_bias)):
            if bias is not None and tuple(bias.shape) != (heads, head_dim):
                raise ModelOptExtError.at(
                    folder,
                    f"{name}: {side}",
                    f"shape {[1, heads, 1, head_dim]}",
                    [1, bias.shape[0], 1, bias.shape[1]],
                )


def check_head_dim(recipe: KVRecipe, head_dim: int, where: object) -> None:
    """Raises ModelOptExtError unless vectors of ``head_dim`` can be stored."""
    if head_dim % recipe.format.vector_multiple:
        raise ModelOptExtError.at(
            where,
            "head_dim",
            f"a multiple of {recipe.format.vector_multiple} for a KV cache of {recipe.name}",
            head_dim,
        )
