"""SGLang's Triton attention backend with kernels that read the packed cache."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

from sglang_modelopt_kernels.attention.decode import decode_attention
from sglang_modelopt_kernels.attention.extend import extend_attention


class ModelOptExtTritonBackend(TritonAttnBackend):
    """All of SGLang's bookkeeping (page tables, splits, windows, CUDA graphs); only the two kernels are others."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        # As SGLang does with its own: torch.compile does not look into Triton launches.
        self.decode_attention_fwd = torch.compiler.disable(decode_attention)
        self.extend_attention_fwd = torch.compiler.disable(extend_attention)
