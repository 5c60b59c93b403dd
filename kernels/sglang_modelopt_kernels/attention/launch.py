"""What the launches of the attention kernels share."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sglang_modelopt_kernels.attention.packed import PackedCache


def architecture(tensor: torch.Tensor) -> int | None:
    """Compute capability times ten of the device of a tensor; None on a CPU, where only the interpreter runs."""
    if not tensor.is_cuda:
        return None
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def compute_type(q: torch.Tensor) -> Any:
    """The type of the products: float16 holds every code times block scale; a float32 model gets float32."""
    return tl.float32 if q.dtype == torch.float32 else tl.float16


def options(q: torch.Tensor, keys: PackedCache) -> dict[str, Any]:
    """The constants of every kernel that reads a cache."""
    head_dim = keys.head_dim
    # The interpreter knows no inline assembly and no arithmetic of E4M3.
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
    """Raises NotImplementedError when an argument of SGLang's kernels that these lack is set."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"attention over a quantized KV cache takes no {name}")


def shared_scales(keys: PackedCache, values: PackedCache) -> torch.Tensor:
    """The block scales of both sides; of a format without blocks any tensor, which is not read.

    Raises:
        ValueError: the two caches are not the two sides of one layer.
    """
    if keys.block_scales is not values.block_scales or (keys.side, values.side) != (0, 1):
        raise ValueError("keys and values must share their block scales")
    return keys.scale if keys.block_scales is None else keys.block_scales
