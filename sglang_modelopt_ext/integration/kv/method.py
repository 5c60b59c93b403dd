"""The quantization method by which SGLang sizes and allocates a KV cache of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import KVCacheQuantMethodBase

from sglang_modelopt_ext.checkpoint.kv_cache import FLAG_PREFIX
from sglang_modelopt_ext.checkpoint.kv_scales import KVLayer, LayerRecipes
from sglang_modelopt_ext.integration.kv.layers import rank_layers
from sglang_modelopt_kernels.attention.packed import PackedCache
from sglang_modelopt_kernels.formats.kv_cache import KVFormat


class ModelOptExtKVMethod(KVCacheQuantMethodBase):
    """The buffers of a recipe and their sizes, for SGLang; :class:`.pool.ModelOptExtKVPool` reads and writes them."""

    def __init__(self, recipes: LayerRecipes, first: int = 0) -> None:
        """Make the method of a cache.

        Args:
            recipes: the recipe of each layer.
            first: the number of this rank's first layer.
        """
        self.recipes, self.first = recipes, first
        self.name = FLAG_PREFIX + recipes.declared.name
        self.layers: Mapping[int, KVLayer] = {}

    def load_layers(self, model: torch.nn.Module, layers: Mapping[int, KVLayer], rank: int, size: int) -> None:
        """Keep this rank's part of the scales and biases ``layers``. Raises ModelOptExtError where they do not fit the model."""
        self.layers = rank_layers(model, layers, rank, size)

    def create_buffers(self, size: int, head_num: int, head_dim: int, layer_num: int, device: str) -> dict[str, Any]:
        """Return the buffers of all layers under SGLang's names: codes ``[size, H_kv, ...]``, and block scales if there are any.

        ``k_scale_buffer`` holds the block scales of keys and values, uint8 ``[size, H_kv, 2 * D / 16]``. ``v_scale_buffer`` is
        empty, but exists because SGLang iterates over both lists together.

        Args:
            size: slots (tokens) of the pool.
            head_num: KV heads on this rank.
            head_dim: entries of a vector, D.
            layer_num: layers on this rank.
            device: the pool's device.
        """
        formats = [self.recipes.of(self.first + index).format for index in range(layer_num)]

        def make(width: Callable[[KVFormat], int], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
            return [
                torch.zeros((size, head_num, width(one)), dtype=dtype or one.code_dtype, device=device)
                for one in formats
            ]

        has_scales = any(one.block for one in formats)
        return {
            "k_buffer": make(lambda one: one.code_width(head_dim)),
            "v_buffer": make(lambda one: one.code_width(head_dim)),
            "k_scale_buffer": make(lambda one: 2 * one.scale_bytes(head_dim), torch.uint8) if has_scales else None,
            "v_scale_buffer": make(lambda one: 0, torch.uint8) if has_scales else None,
            "store_dtype": self.recipes.declared.format.code_dtype,
        }

    def compute_cell_size(self, head_num: int, head_dim: int, num_layers: int, kv_size: int) -> int:
        """Return the bytes of one token, keys and values of every layer; ``kv_size``, SGLang's size of an entry, is ignored."""
        del kv_size
        layers = range(self.first, self.first + num_layers)
        return 2 * head_num * sum(self.recipes.of(number).bytes_per_vector(head_dim) for number in layers)

    def pack(
        self, layer_id: int, codes: tuple[torch.Tensor, torch.Tensor], block_scales: torch.Tensor | None, head_dim: int
    ) -> tuple[PackedCache, PackedCache]:
        """Return the packed keys and values of one layer, as views of its buffers.

        Args:
            layer_id: the layer's number in the model.
            codes: the buffers of keys and of values, ``[size, H_kv, ...]``.
            block_scales: uint8 ``[size, H_kv, 2 * D / 16]`` of both; None, or of width 0, for a format without block scales.
            head_dim: entries of a vector, D.
        """
        layer, recipe = self.layers[layer_id], self.recipes.of(layer_id)
        device = codes[0].device
        shared = block_scales.unflatten(-1, (2, -1)) if block_scales is not None and recipe.format.block else None

        def one(index: int, scale: float, bias: torch.Tensor | None) -> PackedCache:
            return PackedCache(
                format=recipe.format,
                codes=codes[index],
                block_scales=shared,
                side=index,
                scale=torch.tensor([scale], dtype=torch.float32, device=device),
                bias=None if bias is None else bias.to(device),
                rotated=recipe.rotate and index == 0,
                head_dim=head_dim,
                dtype=torch.float32,
            )

        return one(0, layer.k_scale, layer.k_bias), one(1, layer.v_scale, layer.v_bias)

    def quantize_and_store(self, *args: Any, **kwargs: Any) -> None:
        """Raise NotImplementedError: the pool writes through its packed caches, which have their layer's scales."""
        raise NotImplementedError("a cache of this recipe is written by ModelOptExtKVPool")

    def dequantize_prev_kv(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Raise NotImplementedError: no attention backend reads an unpacked copy of the cache."""
        raise NotImplementedError("a cache of this recipe is read through ModelOptExtKVPool")
