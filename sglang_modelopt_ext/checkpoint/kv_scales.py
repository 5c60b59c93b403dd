"""The scales and biases of a quantized KV cache in a checkpoint, by layer number of the decoder.

Tensors of the cache lie beside a layer's projections (``model.layers.3.self_attn.k_proj.k_scale``) or in its attention module
(Megatron: ``model.layers.3.self_attn.k_scale``). The name of the module around them differs between checkpoint and server
(``self_attn``, ``attn``, ``mixer``); the layer's number does not. A checkpoint may number the layers of a vision tower or of an
MTP block as well, so that each list of layers is kept apart, by its canonical name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field

import torch

from sglang_modelopt_ext.checkpoint.leftovers import layer_position
from sglang_modelopt_ext.checkpoint.quant_config import QuantConfig
from sglang_modelopt_ext.checkpoint.reader import KV_CACHE_NAMES, is_kv_cache_tensor
from sglang_modelopt_ext.checkpoint.tensors import StoredTensor, read_tensors
from sglang_modelopt_ext.checkpoint.values import check_values
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_kernels.formats.base import ValueRule
from sglang_modelopt_kernels.formats.e4m3 import MAX as E4M3_MAX
from sglang_modelopt_kernels.formats.kv_cache import KVRecipe

_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj")


@dataclass(frozen=True)
class KVLayer:
    """The static scales and biases of one attention layer.

    Attributes:
        k_scale, v_scale: amax / the range of the recipe's format.
        k_bias, v_bias: float32 ``[H_kv, D]``, of all ranks, or None.
    """

    k_scale: float
    v_scale: float
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Attention:
    """The attention layers of the model that is served.

    Attributes:
        layers: the name of the attention module by layer number; layers that share a cache have one entry.
        other_parts: canonical names of the model's top-level parts that are no decoder, such as a vision tower.
    """

    layers: Mapping[int, str]
    other_parts: Set[str] = frozenset()


@dataclass
class StoredLayer:
    """The stored tensors of one layer's KV cache.

    Attributes:
        owner: the checkpoint's name of the module that has the tensors.
        tensors: their headers, by last part of the name (``k_scale``, ``v_bias``, ...).
        has_keys, has_values: whether a projection that makes keys, or values, is stored for the layer.
    """

    owner: str
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    has_keys: bool = False
    has_values: bool = False


@dataclass(frozen=True)
class StoredScales:
    """Every tensor of the KV cache in a checkpoint.

    Attributes:
        config: the checkpoint's declared quantization.
        blocks: the stored layers, by canonical name of the list of layers and by layer number.
    """

    config: QuantConfig
    blocks: Mapping[str, Mapping[int, StoredLayer]]

    def __bool__(self) -> bool:
        return any(layer.tensors for block in self.blocks.values() for layer in block.values())

    def some(self) -> StoredTensor:
        """Return any one of the tensors, for an error's file and for the naming scheme."""
        return next(
            tensor for block in self.blocks.values() for layer in block.values() for tensor in layer.tensors.values()
        )

    def decoder(self, attention: Attention) -> Mapping[int, StoredLayer]:
        """Return the stored layers of the decoder, whose attention layers are ``attention``, by number; empty where none match."""
        wanted = attention.layers.keys()
        places = {place[0] for name in attention.layers.values() if (place := layer_position(name))}
        for path in sorted(places & self.blocks.keys()):
            return self.blocks[path]
        # The list has another name (``backbone.layers`` of Nemotron-H): take the one that has every attention layer of the model.
        for path, block in sorted(self.blocks.items()):
            if wanted and wanted <= block.keys() and path.partition(".")[0] not in attention.other_parts:
                return block
        return {}


def stored_scales(config: QuantConfig, tensors: Mapping[str, StoredTensor]) -> StoredScales:
    """Return the KV cache's tensors among ``tensors``, sorted by layer.

    Raises:
        ModelOptExtError: two modules of one layer have tensors of a cache.
    """
    blocks: dict[str, dict[int, StoredLayer]] = {}
    for name, tensor in tensors.items():
        of_cache = is_kv_cache_tensor(name)
        if not of_cache and not name.endswith((".k_proj.weight", ".v_proj.weight", ".qkv_proj.weight")):
            continue
        module = name.rpartition(".")[0]
        owner = module.rpartition(".")[0] if module.rpartition(".")[2] in _PROJECTIONS else module
        place = layer_position(owner)
        if place is None:
            continue
        layer = blocks.setdefault(place[0], {}).setdefault(place[1], StoredLayer(owner))
        if of_cache:
            if layer.tensors and layer.owner != owner:
                raise ModelOptExtError.at(tensor.file, name, f"the KV cache of {layer.owner} alone in its layer", "two")
            layer.owner = owner
            layer.tensors[name.rpartition(".")[2]] = tensor
        else:
            kind = module.rpartition(".")[2]
            layer.has_keys |= kind in ("k_proj", "qkv_proj")
            layer.has_values |= kind in ("v_proj", "qkv_proj")
    return StoredScales(config, blocks)


@dataclass(frozen=True)
class ResolvedScales:
    """The scales and biases of the attention layers of one model.

    Attributes:
        layers: those of each layer, by layer number.
        default: layer numbers without stored scales, because they are excluded from quantization.
        tensors: names of the tensors that were read.
        problems: the errors of layers that were skipped because ``strict`` was off.
    """

    layers: Mapping[int, KVLayer]
    default: Set[int]
    tensors: Set[str]
    problems: tuple[ModelOptExtError, ...] = ()


@dataclass(frozen=True)
class LayerRecipes:
    """The recipe of each layer's cache.

    Attributes:
        declared: the recipe that the configuration declares, by which stored scales are read.
        other: the recipes of layers that have another one, by layer number.
    """

    declared: KVRecipe
    other: Mapping[int, KVRecipe] = field(default_factory=dict)

    def of(self, number: int) -> KVRecipe:
        """Return the recipe of a layer."""
        return self.other.get(number, self.declared)


def resolve(
    recipes: LayerRecipes,
    stored: StoredScales,
    attention: Attention,
    fallback: Callable[[int], KVLayer],
    *,
    strict: bool,
) -> ResolvedScales:
    """Return the scales and biases of every layer of ``attention``.

    Args:
        recipes: the recipe of each layer, whose format's range the scales are for.
        stored: the checkpoint's tensors; where there are none, every layer gets ``fallback``.
        attention: the attention layers of the model that is served; tensors of other layers are ignored.
        fallback: returns the scales of a layer that was not calibrated.
        strict: whether a layer without scales, or with wrong ones, is an error; otherwise it is skipped.

    Raises:
        ModelOptExtError: with ``strict``, a tensor is missing or wrong.
    """
    if not stored:
        return ResolvedScales({number: fallback(number) for number in attention.layers}, frozenset(), frozenset())
    block = stored.decoder(attention)
    layers: dict[int, KVLayer] = {}
    names: set[str] = set()
    default: set[int] = set()
    problems: list[ModelOptExtError] = []
    for number, module in sorted(attention.layers.items()):
        layer = block.get(number)
        try:
            if layer is None or not layer.tensors:
                owner = layer.owner if layer is not None else module
                if not stored.config.is_excluded(f"{owner}.k_proj"):
                    raise _missing(stored, owner, "k_scale")
                default.add(number)
                if strict:
                    layers[number] = fallback(number)
                continue
            layers[number] = _read_layer(recipes.declared, recipes.of(number), stored, layer)
            names.update(tensor.name for tensor in layer.tensors.values())
        except ModelOptExtError as error:
            if strict:
                raise
            problems.append(error)
    return ResolvedScales(layers, default, names, tuple(problems))


def _missing(stored: StoredScales, owner: str, name: str) -> ModelOptExtError:
    return ModelOptExtError.at(stored.some().file, f"{owner}: {name}", "one for every attention layer", "none")


def wanted_names(recipe: KVRecipe, layer: StoredLayer) -> Iterator[str]:
    """Yield the last parts of the names of the tensors that a layer must have.

    Where one projection makes keys and values (Gemma 4), ModelOpt has no ``v_proj`` to export the values' scale with, and SGLang
    takes the keys' scale for both. Biases are not shared so: keys have a rotary embedding, values have none.
    """
    shared = layer.has_keys and not layer.has_values and not recipe.affine
    for name in sorted(KV_CACHE_NAMES):
        if (recipe.affine or name.endswith("_scale")) and not (shared and name == "v_scale"):
            yield name


def _read_layer(declared: KVRecipe, recipe: KVRecipe, stored: StoredScales, layer: StoredLayer) -> KVLayer:
    for name in wanted_names(recipe, layer):
        if name not in layer.tensors:
            raise _missing(stored, layer.owner, name)
    scales: dict[str, float] = {}
    biases: dict[str, torch.Tensor] = {}
    for header, tensor in read_tensors(list(layer.tensors.values())):
        name = header.name.rpartition(".")[2]
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ModelOptExtError.at(header.file, header.name, "16-bit or 32-bit floats", tensor.dtype)
        if name.endswith("_scale"):
            if tensor.numel() != 1:
                raise ModelOptExtError.at(header.file, header.name, "one value", f"shape {list(tensor.shape)}")
            check_values(header.file, header.name, tensor, ValueRule.POSITIVE)
            # Compute in float64 and round once: the stored scale is itself a rounded quotient.
            scales[name] = float(tensor) * stored_divisor(declared, header.name) / recipe.format.range
        elif recipe.affine:
            if tensor.dim() != 4 or (tensor.shape[0], tensor.shape[2]) != (1, 1):
                raise ModelOptExtError.at(
                    header.file, header.name, "shape [1, KV heads, 1, head_dim]", list(tensor.shape)
                )
            check_values(header.file, header.name, tensor, ValueRule.FINITE)
            biases[name] = tensor[0, :, 0].to(torch.float32)
    k_scale = scales["k_scale"]
    return KVLayer(k_scale, scales.get("v_scale", k_scale), biases.get("k_bias"), biases.get("v_bias"))


def stored_divisor(recipe: KVRecipe, tensor: str) -> float:
    """Return the divisor in a stored scale = amax / divisor: the format's range in Megatron's exports, E4M3's in the others."""
    megatron = tensor.rpartition(".")[0].rpartition(".")[2] not in _PROJECTIONS
    return recipe.format.range if megatron else E4M3_MAX
