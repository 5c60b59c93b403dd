"""Naive twin of extend attention, in float64: one request and one head after the other."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.attention.naive import softmax_product, unpacked
from sglang_modelopt_kernels.attention.packed import PackedCache


def naive_extend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: PackedCache,
    values: PackedCache,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    logit_cap: float = 0.0,
    causal: bool = True,
    window: int = -1,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute :func:`extend_attention` in float64, ``[T, Hq, D]``.

    New tokens attend to their cached prefix, and to themselves without quantization. With a window, the query at position p sees
    keys from p - window on.
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    groups = q.shape[1] // keys.shape[1]
    for request in range(len(qo_indptr) - 1):
        new = slice(int(qo_indptr[request]), int(qo_indptr[request + 1]))
        slots = kv_indices[kv_indptr[request] : kv_indptr[request + 1]].long()
        prefix, count = len(slots), new.stop - new.start
        query = torch.arange(prefix, prefix + count, device=q.device)[:, None]
        key = torch.arange(prefix + count, device=q.device)[None, :]
        mask = torch.ones(count, prefix + count, dtype=torch.bool, device=q.device)
        if causal:
            mask &= key <= query
        if window > 0:
            mask &= query <= key + window
            if not causal:
                mask &= (key <= query + window) | (key < prefix)
        whole_k = torch.cat((unpacked(keys, slots), k[new].double()))
        whole_v = torch.cat((unpacked(values, slots), v[new].double()))
        for head in range(q.shape[1]):
            pair = whole_k[:, head // groups], whole_v[:, head // groups]
            sink = None if sinks is None else sinks[head]
            out[new, head] = softmax_product(q[new, head].double(), *pair, sm_scale, logit_cap, mask, sink)
    return out
