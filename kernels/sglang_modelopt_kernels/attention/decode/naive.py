"""Naive twin of decode attention, in float64: one request and one head after the other."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.attention.naive import softmax_product, unpacked
from sglang_modelopt_kernels.attention.packed import PackedCache


def naive_decode(
    q: torch.Tensor,
    keys: PackedCache,
    values: PackedCache,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute :func:`decode_attention` in float64, ``[B, Hq, D]``: one query of each request over its cached tokens."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    groups = q.shape[1] // keys.shape[1]
    for request in range(q.shape[0]):
        slots = kv_indices[kv_indptr[request] : kv_indptr[request + 1]].long()
        if not len(slots):
            continue
        k, v = unpacked(keys, slots), unpacked(values, slots)
        for head in range(q.shape[1]):
            pair = k[:, head // groups], v[:, head // groups]
            sink = None if sinks is None else sinks[head]
            out[request, head] = softmax_product(
                q[request, head][None].double(), *pair, sm_scale, logit_cap, None, sink
            )[0]
    return out
