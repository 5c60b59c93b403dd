"""Naive twins of the kernels that store keys and values and rotate queries: plain PyTorch, in float32."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.attention.packed import PackedCache
from sglang_modelopt_kernels.formats.kv_cache import rotate


def naive_store_kv(
    keys: PackedCache, values: PackedCache, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Round the keys and values ``[T, H, D]`` of new tokens and write them to ``slots`` ``[T]``, see :func:`store_kv`."""
    keys.store(slots, k)
    values.store(slots, v)


def naive_rotate_queries(q: torch.Tensor) -> torch.Tensor:
    """Rotate queries ``[..., D]`` as the keys are rotated, float32, see :func:`rotate_queries`."""
    return rotate(q.to(torch.float32))
