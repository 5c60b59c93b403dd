"""The launches. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

import torch
import triton

from sglang_modelopt_kernels.attention.launch import shared_scales
from sglang_modelopt_kernels.attention.packed import PackedCache
from sglang_modelopt_kernels.attention.store.kernel import store_kernel, turn_kernel
from sglang_modelopt_kernels.formats.kv_cache import hadamard_block

TOKENS = 16
"""Tokens of a program: the smallest M of a matrix instruction."""

MOST_ROTATED = 128
"""The largest head_dim whose Hadamard matrix fits the shared memory of every architecture."""


def store_kv(keys: PackedCache, values: PackedCache, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Round the keys and values of new tokens and write them to their slots, as :func:`naive_store_kv` does.

    Args:
        keys, values: the caches of one layer, of one recipe.
        slots: int32 or int64 ``[T]``, every slot once.
        k, v: ``[T, H, D]`` of one float dtype; the vectors of a token are contiguous, tokens may be strided.

    Raises:
        ValueError: a shape that does not fit.
    """
    tokens, heads, head_dim = k.shape
    if v.shape != k.shape or keys.shape[1:] != k.shape[1:] or slots.shape != (tokens,):
        raise ValueError(f"keys {tuple(k.shape)}, values {tuple(v.shape)}, {tuple(slots.shape)} slots, {keys.shape}")
    if keys.rotated and head_dim > MOST_ROTATED:
        raise ValueError(f"head_dim {head_dim}: these kernels rotate at most {MOST_ROTATED}")
    if tokens == 0:
        return
    k, v = (x if x.stride()[1:] == (head_dim, 1) else x.contiguous() for x in (k, v))
    unused = keys.scale
    padded = triton.next_power_of_2(head_dim)
    store_kernel[(triton.cdiv(tokens, TOKENS), heads, 2)](
        k,
        v,
        slots,
        keys.codes,
        keys.scale,
        unused if keys.bias is None else keys.bias,
        values.codes,
        shared_scales(keys, values),
        values.scale,
        unused if values.bias is None else values.bias,
        tokens,
        k.stride(0),
        v.stride(0),
        H=heads,
        D=head_dim,
        DP=padded,
        SIZE=hadamard_block(head_dim),
        FP4=keys.format.block > 0,
        AFFINE=keys.bias is not None,
        ROTATE=keys.rotated,
        NATIVE=k.is_cuda,
        BT=TOKENS,
        num_warps=4,
    )


def rotate_queries(q: torch.Tensor) -> torch.Tensor:
    """Rotate contiguous queries ``[..., D]`` as the keys are rotated: fp16, or fp32 for fp32 queries.

    Raises:
        ValueError: D is above MOST_ROTATED.
    """
    head_dim = q.shape[-1]
    if head_dim > MOST_ROTATED:
        raise ValueError(f"head_dim {head_dim}: these kernels rotate at most {MOST_ROTATED}")
    rows = q.numel() // head_dim
    rotated = torch.empty_like(q, dtype=torch.float32 if q.dtype == torch.float32 else torch.float16)
    if rows:
        turn_kernel[(triton.cdiv(rows, TOKENS),)](
            q,
            rotated,
            rows,
            D=head_dim,
            DP=triton.next_power_of_2(head_dim),
            SIZE=hadamard_block(head_dim),
            NATIVE=q.is_cuda,
            BT=TOKENS,
            num_warps=4,
        )
    return rotated
