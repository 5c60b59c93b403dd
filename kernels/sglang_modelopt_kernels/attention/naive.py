"""Parts of the naive twins of attention, in float64: vectors read back, and the softmax of one head of one request."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.attention.packed import PackedCache


def unpacked(cache: PackedCache, slots: torch.Tensor) -> torch.Tensor:
    """Read back the vectors of ``slots``, float64 ``[T, H, D]``, for a cache whose ``dtype`` holds them exactly."""
    return cache[slots].to(torch.float64)


def softmax_product(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float,
    logit_cap: float,
    mask: torch.Tensor | None,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention of queries ``[M, D]`` over ``[N, D]``, all float64; ``mask`` bool ``[M, N]``, rows of False give zero.

    ``sink``, a scalar, is the logit of a further key whose value is zero: it is neither scaled nor capped.
    """
    logits = q @ k.T * sm_scale
    if logit_cap > 0:
        logits = logit_cap * torch.tanh(logits / logit_cap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if sink is not None:
        logits = torch.cat((logits, sink.double().expand(len(logits), 1)), dim=1)
    weights = torch.softmax(logits, dim=-1).nan_to_num(0.0) if mask is not None else torch.softmax(logits, dim=-1)
    return weights[:, : len(v)] @ v
