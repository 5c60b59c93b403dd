"""SGLang's Triton attention backend with kernels that read the packed cache."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

from sglang_modelopt_kernels.attention.decode import DecodeScratch, decode_attention
from sglang_modelopt_kernels.attention.extend import extend_attention
from sglang_modelopt_kernels.attention.packed import PackedCache


class ModelOptExtTritonBackend(TritonAttnBackend):
    """All of SGLang's bookkeeping (page tables, windows, CUDA graphs); the two kernels, and how decoding is cut, are others."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        processors = max(1, self.device_core_count)
        most = runner.req_to_token_pool.size
        self.scratch = DecodeScratch(most, self.num_head, self.num_kv_head, self.v_head_dim, processors, self.device)
        # SGLang's own scratch, which holds as many parts of every request, is not written.
        self.max_kv_splits: int = 1
        # As SGLang does with its own: torch.compile does not look into Triton launches.
        self.decode_attention_fwd = torch.compiler.disable(self._decode)
        self.extend_attention_fwd = torch.compiler.disable(extend_attention)

    def _decode(
        self,
        q: torch.Tensor,
        k_buffer: PackedCache,
        v_buffer: PackedCache,
        o: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        attn_logits: torch.Tensor,
        attn_lse: torch.Tensor,
        num_kv_splits: torch.Tensor,
        max_kv_splits: int,
        sm_scale: float,
        k_scale: float,
        v_scale: float,
        **options: Any,
    ) -> None:
        """SGLang's call, with scratch of our own: how often a request is cut follows from the size of the batch alone."""
        del attn_logits, attn_lse, num_kv_splits, max_kv_splits
        if q.shape[0] == 0:
            return
        partial, lse = self.scratch.of(q.shape[0], q.shape[1])
        splits = partial.shape[2]
        decode_attention(
            q,
            k_buffer,
            v_buffer,
            o,
            kv_indptr,
            kv_indices,
            partial,
            lse,
            None,
            splits,
            sm_scale,
            k_scale,
            v_scale,
            **options,
        )

    def get_num_kv_splits(
        self, num_kv_splits: torch.Tensor, seq_lens: torch.Tensor, uneven_batch: torch.Tensor | None = None
    ) -> None:
        """Nothing: the kernels do not read it."""
        del num_kv_splits, seq_lens, uneven_batch
