"""SGLang's Triton attention backend with kernels that read the packed cache."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

from sglang_modelopt_kernels.attention.decode import DecodeScratch, decode_attention
from sglang_modelopt_kernels.attention.extend import extend_attention
from sglang_modelopt_kernels.attention.packed import PackedCache


class ModelOptExtTritonBackend(TritonAttnBackend):
    """An attention backend with SGLang's bookkeeping (page tables, windows, CUDA graphs) and this package's two kernels.

    Decoding splits the cached tokens of a request (split-KV) by a rule of this package as well.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        sms = max(1, self.device_core_count)
        most = runner.req_to_token_pool.size
        self.scratch = DecodeScratch(most, self.num_head, self.num_kv_head, self.v_head_dim, sms, self.device)
        # SGLang sizes its own scratch by this number of splits, and the kernels here do not write it.
        self.max_kv_splits: int = 1
        # SGLang disables torch.compile for its own attention kernels too: it does not trace Triton launches.
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
        """Compute decode attention with the arguments of SGLang's kernel, and write ``o``.

        Scratch is this package's own: the number of splits of a request follows from the size of the batch alone.
        """
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
        """Do nothing: the kernels do not read ``num_kv_splits``."""
        del num_kv_splits, seq_lens, uneven_batch
