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

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_modelopt_ext.checkpoint.kv_scales import (
    Attention,
    KVLayer,
    ResolvedScales,
    StoredScales,
    resolve,
    stored_divisor,
    stored_scales,
)
from sglang_modelopt_ext.checkpoint.quant_config import (
    CONFIG_NAME,
    KV_CACHE_RECIPE,
    OWN_KEY,
    QuantConfig,
    text_config,
)
from sglang_modelopt_ext.checkpoint.reader import is_kv_cache_tensor
from sglang_modelopt_ext.checkpoint.tensors import read_headers, tensor_names
from sglang_modelopt_ext.errors import ModelOptExtError
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

DECODER_LAYERS = "layers"
"""The usual place of the decoder's layers, by canonical name."""


@dataclass(frozen=True)
class KVCachePlan:
    """How the KV cache of a model is quantized.

    Attributes:
        recipe: the formats and what is done around them.
        source: where its scales are from, for the log.
        folder: the checkpoint.
        stored: what its tensors say, None when every layer has the scale of an amax of 448.
    """

    recipe: KVRecipe
    source: str
    folder: Path | None = None
    stored: StoredScales | None = None

    @property
    def fallback(self) -> KVLayer:
        """The numbers of a layer that nobody calibrated."""
        scale = CAST_AMAX / self.recipe.format.range
        return KVLayer(scale, scale)

    def resolve(self, attention: Attention, *, strict: bool = True) -> ResolvedScales:
        """The numbers of the attention layers of a model, see :func:`~sglang_modelopt_ext.checkpoint.kv_scales.resolve`."""
        if self.stored is None:
            return ResolvedScales(dict.fromkeys(attention.layers, self.fallback), frozenset(), frozenset())
        if strict and self.recipe.affine and not self.stored:
            where = self.stored.config.file
            raise ModelOptExtError.at(where, "kv_cache_quant_algo", "k_bias and v_bias tensors for it", "none")
        return resolve(self.recipe, self.stored, attention, self.fallback, strict=strict)

    @functools.cached_property
    def layers(self) -> Mapping[int, KVLayer]:
        """The numbers of the decoder's layers as config.json and the tensors have them, empty where none are stored.

        For those who have no model at hand. Raises ModelOptExtError for what is wrong with them.
        """
        if self.folder is None or not self.stored:
            return self.resolve(Attention({})).layers
        layers = self.resolve(_declared_attention(self.folder, self.stored)).layers
        _check_heads(self.folder, self.recipe, layers)
        return layers

    def layer(self, number: int) -> KVLayer:
        """The numbers of one of :attr:`layers`; of any layer where none are stored."""
        return self.layers[number] if self.layers else self.fallback


def kv_cache_plan(
    folder: Path, config: QuantConfig | None, flag: str, names: Collection[str] | None = None
) -> KVCachePlan | None:
    """How the model in ``folder`` is to be cached under ``--kv-cache-dtype flag``; None where it is SGLang's own business.

    The recipe only, which has to be settled before a model on the hub is downloaded: :func:`read_plan` has the scales as well.

    Args:
        folder: the checkpoint.
        config: what it declares, None when ModelOpt did not write it.
        flag: the flag's value, ``auto`` when it was not given.
        names: of its tensors; those that :func:`tensor_names` finds by default. Where there are none, FP8 is taken for plain.

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
    names = tensor_names(folder) if names is None else names
    recipe = _recipe(config, recipes, sorted(name for name in names if is_kv_cache_tensor(name)), folder)
    if flag not in KV_FLAGS and is_latent(folder):
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
    check_declared_head_dim(folder, recipe)
    return KVCachePlan(recipe, f"{config.file.name}, scales of its tensors", folder)


def read_plan(folder: Path, config: QuantConfig | None, flag: str) -> KVCachePlan | None:
    """:func:`kv_cache_plan` with the scales, from a ``folder`` that has the weights. Raises ModelOptExtError likewise."""
    tensors = read_headers(folder) if config is not None and config.kv_cache_algo is not None else {}
    plan = kv_cache_plan(folder, config, flag, tensors)
    if plan is None or config is None or plan.folder is None:
        return plan
    stored = stored_scales(config, tensors)
    return dataclasses.replace(plan, source=_source(config, plan.recipe, stored), stored=stored)


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


def _recipe(config: QuantConfig, recipes: tuple[str, ...], stored: Sequence[str], folder: Path) -> KVRecipe:
    bias = next((name for name in stored if name.endswith("_bias")), None)
    recipe = KV_RECIPES[config.kv_cache_recipe or recipes[0]]
    if bias is not None and not recipe.affine:
        affine = next((KV_RECIPES[name] for name in recipes if KV_RECIPES[name].affine), None)
        if affine is None or config.kv_cache_recipe is not None:
            raise ModelOptExtError.at(folder, bias, f"no biases for {config.kv_cache_algo}", "one")
        return affine
    return recipe


def _source(config: QuantConfig, recipe: KVRecipe, stored: StoredScales) -> str:
    if not stored:
        return f"{config.file.name}, no scales stored, amax {CAST_AMAX:g}"
    return f"{config.file.name}, scales read as amax / {stored_divisor(recipe, stored.some().name):g}"


def _declared_attention(folder: Path, stored: StoredScales) -> Attention:
    """The decoder's attention layers by what is stored of each, up to the number that config.json has."""
    fields = text_config(folder)
    count = fields.get("num_hidden_layers")
    shared = fields.get("num_kv_shared_layers")  # the last ones, which read the caches of others
    end = count - (shared if isinstance(shared, int) else 0) if isinstance(count, int) else None
    # Without a model's names: the list of most layers whose attention stores anything, the decoder's by far.
    path = max(stored.blocks, key=lambda path: (path == DECODER_LAYERS, len(stored.blocks[path])))
    numbers = (number for number in stored.blocks[path] if end is None or number < end)
    return Attention({number: f"{path}.{number}.self_attn" for number in numbers})


def is_latent(folder: Path) -> bool:
    """Whether the model caches latent vectors (MLA), which have one scale and are SGLang's own business."""
    return text_config(folder).get("kv_lora_rank") is not None


def _head_sizes(folder: Path) -> tuple[int, int] | None:
    """``(KV heads, head_dim)`` of config.json, None where it does not state them."""
    fields = text_config(folder)
    queries = fields.get("num_attention_heads")
    heads = fields.get("num_key_value_heads") or queries
    head_dim = fields.get("head_dim")
    if head_dim is None and isinstance(queries, int) and isinstance(fields.get("hidden_size"), int):
        head_dim = fields["hidden_size"] // queries
    return (heads, head_dim) if isinstance(head_dim, int) and isinstance(heads, int) else None


def check_declared_head_dim(folder: Path, recipe: KVRecipe) -> None:
    """:func:`check_head_dim` of config.json, where it states one."""
    sizes = _head_sizes(folder)
    if sizes is not None:
        check_head_dim(recipe, sizes[1], folder / CONFIG_NAME)


def _check_heads(folder: Path, recipe: KVRecipe, layers: Mapping[int, KVLayer]) -> None:
    """Head counts and sizes against config.json, where it states them."""
    sizes = _head_sizes(folder)
    if sizes is None:
        return
    for number, layer in layers.items():
        for side, bias in (("k_bias", layer.k_bias), ("v_bias", layer.v_bias)):
            if bias is not None and tuple(bias.shape) != sizes:
                raise ModelOptExtError.at(
                    folder,
                    f"layers.{number}.self_attn: {side}",
                    f"shape {[1, sizes[0], 1, sizes[1]]}",
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
