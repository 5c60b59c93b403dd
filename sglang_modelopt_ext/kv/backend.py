"""SGLang's Triton attention backend with kernels that read the packed cache."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

from sglang_modelopt_kernels.attention.decode.decode import count_splits, decode_attention
from sglang_modelopt_kernels.attention.extend import extend_attention

LEAST_MAX_SPLITS = 16
"""Room for that many parts of a request: SGLang's default of 8 leaves processors idle in small batches."""


class ModelOptExtTritonBackend(TritonAttnBackend):
    """All of SGLang's bookkeeping (page tables, splits, windows, CUDA graphs); only the two kernels are others."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.max_kv_splits: int = max(self.max_kv_splits, LEAST_MAX_SPLITS)
        # As SGLang does with its own: torch.compile does not look into Triton launches.
        self.decode_attention_fwd = torch.compiler.disable(decode_attention)
        self.extend_attention_fwd = torch.compiler.disable(extend_attention)

    def get_num_kv_splits(
        self, num_kv_splits: torch.Tensor, seq_lens: torch.Tensor, uneven_batch: torch.Tensor | None = None
    ) -> None:
        """The same number for every request, from the size of the batch alone."""
        del uneven_batch, seq_lens
        processors = max(1, self.device_core_count)
        count = count_splits(len(num_kv_splits), self.num_kv_head, processors, self.max_kv_splits)
        num_kv_splits.fill_(count)
