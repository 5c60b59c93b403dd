"""The memory pools of a KV cache of this package: keys and values are packed when written, and attention reads them packed.

A model with plain attention has one :class:`ModelOptExtKVPool`. A hybrid model has such pools inside a pool of SGLang's, which
translates layers and slots: one for the attention layers beside linear attention, or two, for layers with and without a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, MHATokenToKVPool, unwrap_write_loc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.kv.method import ModelOptExtKVMethod
from sglang_modelopt_kernels.attention.packed import PackedCache
from sglang_modelopt_kernels.attention.store import store_kv


class ModelOptExtKVPool(MHATokenToKVPool):
    """SGLang's pool of plain attention, with a :class:`PackedCache` for the keys and for the values of each layer.

    ``get_key_buffer`` and ``get_value_buffer`` return these. The torch_native backend indexes one like a tensor, which unpacks only
    the tokens of the index; the Triton backend passes it to kernels that read it packed. Layers have their scales, and can be read,
    once :func:`number_layers` was called for the model's pool.
    """

    quant_method: ModelOptExtKVMethod

    def number(self, numbers: Sequence[int]) -> None:
        """Give the layers of the pool, in order, their numbers in the model. Those that no attention reads get no scales."""
        codes = zip(self.k_buffer, self.v_buffer, strict=True)
        block_scales = self.k_scale_buffer or [None] * self.layer_num
        self.packed: dict[int, tuple[PackedCache, PackedCache]] = {
            index: self.quant_method.pack(number, pair, scales, self.head_dim)
            for index, (number, pair, scales) in enumerate(zip(numbers, codes, block_scales, strict=True))
            if number in self.quant_method.layers
        }

    def _slot_move_pointer_buffers(self) -> list[torch.Tensor]:
        """Return the buffers among which SGLang moves slots, without the empty ones, which have no address.

        The widest is the first: SGLang's copy moves as many bytes of each slot as that one has.
        """
        buffers = [buffer for buffer in super()._slot_move_pointer_buffers() if buffer.numel()]
        return sorted(buffers, key=lambda buffer: -buffer[0].nbytes)

    def _get_key_buffer(self, layer_id: int) -> PackedCache:
        return self.packed[layer_id - self.start_layer][0]

    def _get_value_buffer(self, layer_id: int) -> PackedCache:
        return self.packed[layer_id - self.start_layer][1]

    def _set_quantized_kv_buffer(
        self,
        layer_id: int,
        global_layer_id: int,
        loc_info: Any,
        cache_k: torch.Tensor,
        cache_v: torch.Tensor,
        k_scale: Any = None,
        v_scale: Any = None,
    ) -> None:
        del global_layer_id, k_scale, v_scale  # the packed caches have their scales
        slots, _, _ = unwrap_write_loc(loc_info)
        keys, values = self.packed[layer_id - self.start_layer]
        if cache_k.is_cuda:
            store_kv(keys, values, slots, cache_k, cache_v)
            return
        keys.store(slots, cache_k)
        values.store(slots, cache_v)

    def get_cpu_copy(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ModelOptExtError: an offload to the host is not supported, since SGLang's copy lacks the block scales."""
        raise ModelOptExtError.at(
            "KV cache", self.quant_method.name, "a cache that stays on its device", "an offload to the host"
        )

    load_cpu_copy = get_cpu_copy


def packed_pools(pool: Any) -> Iterator[tuple[ModelOptExtKVPool, list[int]]]:
    """Yield each pool of this package that is ``pool`` or inside it, with the numbers in the model of its layers, in order."""
    if isinstance(pool, ModelOptExtKVPool):
        yield pool, list(range(pool.start_layer, pool.start_layer + pool.layer_num))
    elif isinstance(pool, HybridLinearKVPool):
        if isinstance(pool.full_kv_pool, ModelOptExtKVPool):
            yield pool.full_kv_pool, _in_order(pool.full_attention_layer_id_mapping)
    elif isinstance(pool, SWAKVPool):
        for inner, has_window in ((pool.full_kv_pool, False), (pool.swa_kv_pool, True)):
            if isinstance(inner, ModelOptExtKVPool):
                places = pool.layers_mapping.items()
                yield (
                    inner,
                    _in_order({number: place for number, (place, windowed) in places if windowed == has_window}),
                )


def _in_order(places: dict[int, int]) -> list[int]:
    """Return the keys, layer numbers, in the order of the values, their places in a pool."""
    return sorted(places, key=places.__getitem__)


def is_packed(pool: Any) -> bool:
    """Return whether attention reads this package's packed caches from a model's pool."""
    return any(True for _ in packed_pools(pool))


def number_layers(pool: Any) -> None:
    """Number the layers of the pools in ``pool``, which was just built.

    Raises:
        ModelOptExtError: an attention layer of the model, whose scales were read, has no place in a pool.
    """
    pools = list(packed_pools(pool))
    for inner, numbers in pools:
        inner.number(numbers)
    placed = {number for _, numbers in pools for number in numbers}
    for inner, _ in pools:
        for number in sorted(inner.quant_method.layers.keys() - placed):
            expected = f"a place in {type(pool).__name__} for every attention layer"
            raise ModelOptExtError.at("KV cache", f"layer {number}", expected, "none")
