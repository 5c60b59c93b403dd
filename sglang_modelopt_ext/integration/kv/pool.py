"""The memory pool of a KV cache of this package: keys and values are packed when written, and attention reads them packed."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, unwrap_write_loc

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.kv.method import ModelOptExtKVMethod
from sglang_modelopt_kernels.attention.packed import PackedCache
from sglang_modelopt_kernels.attention.store import store_kv


class ModelOptExtKVPool(MHATokenToKVPool):
    """SGLang's pool of plain attention, with a :class:`PackedCache` for the keys and for the values of each layer.

    ``get_key_buffer`` and ``get_value_buffer`` return these. The torch_native backend indexes one like a tensor, which unpacks only
    the tokens of the index; the Triton backend passes it to kernels that read it packed.
    """

    quant_method: ModelOptExtKVMethod

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        codes = zip(self.k_buffer, self.v_buffer, strict=True)
        block_scales = self.k_scale_buffer or [None] * self.layer_num
        self.packed: list[tuple[PackedCache, PackedCache]] = [
            self.quant_method.pack(self.start_layer + index, *buffers, self.head_dim)
            for index, buffers in enumerate(zip(codes, block_scales, strict=True))
        ]

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
