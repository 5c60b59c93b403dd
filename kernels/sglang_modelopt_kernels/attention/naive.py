"""The naive twins, in float64: unpack the vectors, multiply, softmax, one request and one head after the other."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.attention.packed import PackedCache


def unpacked(cache: PackedCache, slots: torch.Tensor) -> torch.Tensor:
    """The vectors of some slots, float64 ``[T, H, D]``, rounded to nothing on the way."""
    return cache[slots].to(torch.float64)


def softmax_product(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, logit_cap: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of queries ``[M, D]`` over ``[N, D]``, all float64; ``mask`` bool ``[M, N]``. Zero where nothing is seen."""
    logits = q @ k.T * sm_scale
    if logit_cap > 0:
        logits = logit_cap * torch.tanh(logits / logit_cap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    weights = torch.softmax(logits, dim=-1).nan_to_num(0.0) if mask is not None else torch.softmax(logits, dim=-1)
    return weights @ v


def naive_decode(
    q: torch.Tensor,
    keys: PackedCache,
    values: PackedCache,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """One query of each request over its cached tokens: float64 ``[B, Hq, D]`` for ``q`` ``[B, Hq, D]``."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    groups = q.shape[1] // keys.shape[1]
    for request in range(q.shape[0]):
        slots = kv_indices[kv_indptr[request] : kv_indptr[request + 1]].long()
        if not len(slots):
            continue
        k, v = unpacked(keys, slots), unpacked(values, slots)
        for head in range(q.shape[1]):
            pair = k[:, head // groups], v[:, head // groups]
            out[request, head] = softmax_product(q[request, head][None].double(), *pair, sm_scale, logit_cap, None)[0]
    return out


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
) -> torch.Tensor:
    """New tokens ``[T, H, D]`` over cached prefixes and themselves unrounded: float64 ``[T, Hq, D]``.

    With a window, a query at p sees keys from p - window on.
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
            out[new, head] = softmax_product(q[new, head].double(), *pair, sm_scale, logit_cap, mask)
    return out
