"""How SGLang sizes and allocates a cache of ours: its ``KVCacheQuantMethodBase``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import KVCacheQuantMethodBase

from sglang_modelopt_ext.checkpoint.kv_cache import FLAG_PREFIX
from sglang_modelopt_ext.checkpoint.kv_scales import KVLayer
from sglang_modelopt_ext.integration.kv.layers import rank_layers
from sglang_modelopt_kernels.attention.packed import PackedCache
from sglang_modelopt_kernels.formats.kv_cache import KVRecipe


class ModelOptExtKVMethod(KVCacheQuantMethodBase):
    """A recipe's buffers and their size; :class:`.pool.ModelOptExtKVPool` reads and writes them."""

    def __init__(self, recipe: KVRecipe) -> None:
        self.recipe = recipe
        self.name = FLAG_PREFIX + recipe.name
        self.layers: Mapping[int, KVLayer] = {}

    def load_layers(self, model: torch.nn.Module, numbers: Mapping[int, KVLayer], rank: int, size: int) -> None:
        """Takes this rank's scales and biases from ``numbers``. Raises ModelOptExtError where they do not fit the model."""
        self.layers = rank_layers(model, numbers, rank, size)

    def create_buffers(self, size: int, head_num: int, head_dim: int, layer_num: int, device: str) -> dict[str, Any]:
        """SGLang's names for the codes ``[size, H, ...]`` of each layer, and the block scales where there are any.

        ``k_scale_buffer`` holds those of keys and values, ``[size, H, 2 * D / 16]``; ``v_scale_buffer`` is there, and empty,
        because SGLang goes through both lists side by side.
        """
        number = self.recipe.format

        def make(width: int, dtype: torch.dtype) -> list[torch.Tensor]:
            return [torch.zeros((size, head_num, width), dtype=dtype, device=device) for _ in range(layer_num)]

        scales = number.scale_bytes(head_dim)
        return {
            "k_buffer": make(number.code_width(head_dim), number.code_dtype),
            "v_buffer": make(number.code_width(head_dim), number.code_dtype),
            "k_scale_buffer": make(2 * scales, torch.uint8) if scales else None,
            "v_scale_buffer": make(0, torch.uint8) if scales else None,
            "store_dtype": number.code_dtype,
        }

    def compute_cell_size(self, head_num: int, head_dim: int, num_layers: int, kv_size: int) -> int:
        """Bytes for one token: keys and values of every layer. ``kv_size``, the storage type's size, plays no part."""
        del kv_size
        return 2 * head_num * num_layers * self.recipe.bytes_per_vector(head_dim)

    def pack(
        self, layer_id: int, codes: tuple[torch.Tensor, torch.Tensor], block_scales: torch.Tensor | None, head_dim: int
    ) -> tuple[PackedCache, PackedCache]:
        """The keys and the values of one layer over its codes ``(of k, of v)`` and the block scales of both."""
        layer = self.layers[layer_id]
        device = codes[0].device
        shared = None if block_scales is None else block_scales.unflatten(-1, (2, -1))

        def one(index: int, scale: float, bias: torch.Tensor | None) -> PackedCache:
            return PackedCache(
                format=self.recipe.format,
                codes=codes[index],
                block_scales=shared,
                side=index,
                scale=torch.tensor([scale], dtype=torch.float32, device=device),
                bias=None if bias is None else bias.to(device),
                rotated=self.recipe.rotate and index == 0,
                head_dim=head_dim,
                dtype=torch.float32,
            )

        return one(0, layer.k_scale, layer.k_bias), one(1, layer.v_scale, layer.v_bias)

    def quantize_and_store(self, *args: Any, **kwargs: Any) -> None:
        """Not used: the pool writes through its packed caches, which know their layer."""
        raise NotImplementedError("a cache of this recipe is written by ModelOptExtKVPool")

    def dequantize_prev_kv(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Not used: no attention backend gets a full-width copy."""
        raise NotImplementedError("a cache of this recipe is read through ModelOptExtKVPool")
