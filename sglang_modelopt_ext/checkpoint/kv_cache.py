"""The KV cache that a checkpoint asks for: its recipe, and the scales and biases of every attention layer.

Sources of the recipe and the scales:

- ``kv_cache_quant_algo`` is FP8, NVFP4 or NVFP4_AFFINE. FP8 with ``k_bias`` and ``v_bias`` is the affine preset.
- A rotated NVFP4 cache is exported as NVFP4; this package records ``kv_cache_recipe`` under its own key, and
  ``--kv-cache-dtype modelopt_nvfp4_rotate`` selects rotation for other exports.
- Exports in Hugging Face's naming store ``k_proj.k_scale`` = amax / 448 for both formats. Exports of Megatron models store
  ``self_attn.k_scale``: amax / 448 for FP8 and amax / 2688 for NVFP4 (``get_scaling_factor`` in ``torch/export/quant_utils.py``).
- The ``_cast`` presets store no scales: their amax is 448.
- A cache whose precision differs by layer is exported as NVFP4; this package records ``kv_cache_layers``, the layers that have
  another recipe. Their scales are read as those of the others: amax / 448 is stored for FP8 and for NVFP4.
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
    LayerRecipes,
    ResolvedScales,
    StoredScales,
    resolve,
    stored_divisor,
    stored_scales,
)
from sglang_modelopt_ext.checkpoint.quant_config import (
    CONFIG_NAME,
    KV_CACHE_LAYERS,
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
"""This package's values of ``--kv-cache-dtype``, and the recipe of each."""

UNQUANTIZED_KV = ("bf16", "bfloat16")
"""Values of ``--kv-cache-dtype`` that leave a checkpoint's KV cache quantization unused."""

STOCK_FP8_KV = "fp8_e4m3"
STOCK_FLAGS: dict[str, str] = {STOCK_FP8_KV: "fp8", "nvfp4": "nvfp4"}
"""SGLang's own values of ``--kv-cache-dtype`` for quantized caches, and the recipe that each corresponds to."""

KV_ALGOS: dict[str, tuple[str, ...]] = {
    "FP8": ("fp8", "fp8_affine"),
    "NVFP4": ("nvfp4", "nvfp4_rotate"),
    "NVFP4_AFFINE": ("nvfp4_affine",),
}
"""The recipes that are exported under each ``kv_cache_quant_algo``, the usual one first."""

MIXED_BASE, MIXED = "nvfp4", ("fp8", "nvfp4")
"""The recipe that a cache of several precisions is exported as, and those of its layers: neither has biases or a rotation."""

CAST_AMAX = 448.0
"""The amax that the ``_cast`` presets, and a cache quantized by flag alone, assume."""

DECODER_LAYERS = "layers"
"""The canonical name that most models have for the decoder's list of layers."""


@dataclass(frozen=True)
class KVCachePlan:
    """The quantization of a model's KV cache: a recipe and the source of its scales.

    Attributes:
        recipe: the cache's format, and the bias or rotation around it.
        source: the origin of the scales, for the log.
        folder: the checkpoint.
        stored: the checkpoint's tensors of the cache; None where they were not read or where every layer has an amax of 448.
        other: the recipes of layers that have another one than ``recipe``, by layer number.
    """

    recipe: KVRecipe
    source: str
    folder: Path | None = None
    stored: StoredScales | None = None
    other: Mapping[int, KVRecipe] = dataclasses.field(default_factory=dict)

    @property
    def recipes(self) -> LayerRecipes:
        """The recipe of each layer."""
        return LayerRecipes(self.recipe, self.other)

    def describe(self) -> str:
        """Return the recipe's name, with those of the layers that have another one."""
        return describe_recipes(self.recipes)

    def fallback(self, number: int) -> KVLayer:
        """Return the scales of a layer that was not calibrated, from an amax of 448."""
        scale = CAST_AMAX / self.recipes.of(number).format.range
        return KVLayer(scale, scale)

    def resolve(self, attention: Attention, *, strict: bool = True) -> ResolvedScales:
        """Return the scales and biases of the attention layers of a model.

        Args:
            attention: the attention layers of the model that is served.
            strict: whether a layer without scales, or with wrong ones, is an error.

        Raises:
            ModelOptExtError: with ``strict``, a tensor is missing or wrong.
        """
        if self.stored is None:
            layers = {number: self.fallback(number) for number in attention.layers}
            return ResolvedScales(layers, frozenset(), frozenset())
        if strict and self.recipe.affine and not self.stored:
            where = self.stored.config.file
            raise ModelOptExtError.at(where, "kv_cache_quant_algo", "k_bias and v_bias tensors for it", "none")
        return resolve(self.recipes, self.stored, attention, self.fallback, strict=strict)

    @functools.cached_property
    def layers(self) -> Mapping[int, KVLayer]:
        """The scales and biases of the decoder's layers by layer number, without a model: config.json gives their count.

        Empty where the checkpoint stores none. Raises ModelOptExtError where a tensor is missing or wrong.
        """
        if self.folder is None or not self.stored:
            return self.resolve(Attention({})).layers
        layers = self.resolve(_declared_attention(self.folder, self.stored)).layers
        _check_heads(self.folder, self.recipe, layers)
        return layers

    def layer(self, number: int) -> KVLayer:
        """Return the scales and biases of one layer; those of an amax of 448 where the checkpoint stores none."""
        return self.layers[number] if self.layers else self.fallback(number)


def kv_cache_plan(
    folder: Path, config: QuantConfig | None, flag: str, names: Collection[str] | None = None
) -> KVCachePlan | None:
    """Return the KV cache's plan for ``folder`` under ``--kv-cache-dtype flag``, without scales; None where it is left to SGLang.

    The recipe has to be known before a model on the hub is downloaded. :func:`read_plan` reads the scales as well.

    Args:
        folder: the checkpoint.
        config: its declared quantization, None when ModelOpt did not write it.
        flag: the flag's value, ``auto`` when it was not given.
        names: the names of its tensors, by default those of :func:`tensor_names`. Where there are none, FP8 is taken to have no
            biases.

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
    other = {} if flag in STOCK_FLAGS else _other_recipes(config, recipe, folder)
    return KVCachePlan(recipe, f"{config.file.name}, scales of its tensors", folder, other=other)


def _other_recipes(config: QuantConfig, recipe: KVRecipe, folder: Path) -> dict[int, KVRecipe]:
    """Return the recorded recipes of layers that have another one. Raises ModelOptExtError for a mix that no cache holds."""
    where = f"{OWN_KEY}.{KV_CACHE_LAYERS}"
    count = text_config(folder).get("num_hidden_layers")
    for number, name in config.kv_cache_layers.items():
        if recipe.name != MIXED_BASE or name not in MIXED:
            expected = f"{' or '.join(MIXED)} in layers of a cache of {MIXED_BASE}"
            raise ModelOptExtError.at(config.file, f"{where}.{number}", expected, f"{name} in one of {recipe.name}")
        if isinstance(count, int) and number >= count:
            raise ModelOptExtError.at(config.file, where, f"layers below {count}", number)
    return {number: KV_RECIPES[name] for number, name in config.kv_cache_layers.items() if name != recipe.name}


def describe_recipes(recipes: LayerRecipes) -> str:
    """Return the declared recipe's name, with the names and numbers of layers that have another one."""
    layers: dict[str, int] = {}
    for recipe in recipes.other.values():
        layers[recipe.name] = layers.get(recipe.name, 0) + 1
    return " and ".join(
        [recipes.declared.name, *(f"{name} in {count} layer{'s' * (count > 1)}" for name, count in layers.items())]
    )


def read_plan(folder: Path, config: QuantConfig | None, flag: str) -> KVCachePlan | None:
    """Return the KV cache's plan with its scales, from a ``folder`` that has the weights; None where it is left to SGLang.

    Raises:
        ModelOptExtError: the flag contradicts the checkpoint, a header cannot be read, or tensors do not fit the declaration.
    """
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
    """Return the decoder's attention layers, as stored projections and cache tensors show them, up to config.json's layer count."""
    fields = text_config(folder)
    count = fields.get("num_hidden_layers")
    shared = fields.get("num_kv_shared_layers")  # the last layers, which read the caches of earlier ones
    end = count - (shared if isinstance(shared, int) else 0) if isinstance(count, int) else None
    # No model gives names here. Of the lists of layers that store anything, the decoder's is by far the longest.
    path = max(stored.blocks, key=lambda path: (path == DECODER_LAYERS, len(stored.blocks[path])))
    numbers = (number for number in stored.blocks[path] if end is None or number < end)
    return Attention({number: f"{path}.{number}.self_attn" for number in numbers})


def is_latent(folder: Path) -> bool:
    """Return whether the model caches latent vectors (MLA), which have one scale and are left to SGLang."""
    return text_config(folder).get("kv_lora_rank") is not None


def _head_sizes(folder: Path) -> tuple[int, int] | None:
    """Return ``(KV heads, head_dim)`` of config.json, None where it does not state them."""
    fields = text_config(folder)
    queries = fields.get("num_attention_heads")
    heads = fields.get("num_key_value_heads") or queries
    head_dim = fields.get("head_dim")
    if head_dim is None and isinstance(queries, int) and isinstance(fields.get("hidden_size"), int):
        head_dim = fields["hidden_size"] // queries
    return (heads, head_dim) if isinstance(head_dim, int) and isinstance(heads, int) else None


def check_declared_head_dim(folder: Path, recipe: KVRecipe) -> None:
    """Raise ModelOptExtError when the recipe cannot store vectors of config.json's head_dim; pass where none is stated."""
    sizes = _head_sizes(folder)
    if sizes is not None:
        check_head_dim(recipe, sizes[1], folder / CONFIG_NAME)


def _check_heads(folder: Path, recipe: KVRecipe, layers: Mapping[int, KVLayer]) -> None:
    """Raise ModelOptExtError where a bias does not have the KV heads and head_dim of config.json; pass where none are stated."""
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
    """Raise ModelOptExtError, naming ``where``, unless the recipe's format can store vectors of ``head_dim``."""
    if head_dim % recipe.format.vector_multiple:
        raise ModelOptExtError.at(
            where,
            "head_dim",
            f"a multiple of {recipe.format.vector_multiple} for a KV cache of {recipe.name}",
            head_dim,
        )
