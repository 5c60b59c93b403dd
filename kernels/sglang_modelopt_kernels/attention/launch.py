"""Checks and constants that the launches of the attention kernels share."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sglang_modelopt_kernels.attention.packed import PackedCache


def architecture(tensor: torch.Tensor) -> int | None:
    """Return the compute capability, times ten, of a tensor's device; None on a CPU, where only the interpreter runs."""
    if not tensor.is_cuda:
        return None
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def compute_type(q: torch.Tensor) -> Any:
    """Return the dtype of the products: fp16, exact for every code times block scale, or fp32 for an fp32 model."""
    return tl.float32 if q.dtype == torch.float32 else tl.float16


def options(q: torch.Tensor, keys: PackedCache) -> dict[str, Any]:
    """Return the constexprs of every kernel that reads a cache."""
    head_dim = keys.head_dim
    # Triton's interpreter lacks inline assembly and E4M3 arithmetic.
    return {
        "D": head_dim,
        "DP": triton.next_power_of_2(head_dim),
        "E": max(triton.next_power_of_2(head_dim // 4), 16),
        "FP4": keys.format.block > 0,
        "AFFINE": keys.bias is not None,
        "ASM": q.is_cuda,
        "NATIVE": (architecture(q) or 0) >= 89,
        "COMPUTE": compute_type(q),
    }


def unserved(**arguments: Any) -> None:
    """Raise NotImplementedError where an argument of SGLang's kernels is set that these do not support."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"attention over a quantized KV cache does not support {name}")


def check_sinks(sinks: torch.Tensor | None, query_heads: int) -> None:
    """Raise ValueError for attention sinks that are not one contiguous value for each query head."""
    if sinks is not None and (sinks.shape != (query_heads,) or not sinks.is_contiguous()):
        raise ValueError(f"sinks {tuple(sinks.shape)} with strides {sinks.stride()} for {query_heads} query heads")


def shared_scales(keys: PackedCache, values: PackedCache) -> torch.Tensor:
    """Return the block scales that keys and values share; for a format without blocks any tensor, which is not read.

    Raises:
        ValueError: the two caches are not the two sides of one layer.
    """
    if keys.block_scales is not values.block_scales or (keys.side, values.side) != (0, 1):
        raise ValueError("keys and values must share their block scales")
    return keys.scale if keys.block_scales is None else keys.block_scales
