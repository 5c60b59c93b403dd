"""Launch of extend attention, with the arguments of SGLang's ``extend_attention_fwd``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sglang_modelopt_kernels.attention.extend.kernel import extend_kernel
from sglang_modelopt_kernels.attention.launch import architecture, check_sinks, options, shared_scales, unserved
from sglang_modelopt_kernels.attention.packed import PackedCache
from sglang_modelopt_kernels.attention.store.store import rotate_queries
from sglang_modelopt_kernels.formats.kv_cache import KVFormat
from sglang_modelopt_kernels.gemm.common import checked, needs_drain

_RAW = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class ExtendConfig:
    """New tokens of a program, keys that it reads at a time, warps, and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


def choose_for(number: KVFormat, head_dim: int, arch: int | None, sinks: bool = False) -> ExtendConfig:
    """Return the configuration for a format on an architecture (compute capability times ten, None in the interpreter).

    The large tiles were measured on Hopper. Elsewhere they spill, or Triton 3.8 does not compile them (SM100). With attention sinks
    the small tile spills on Hopper, where ptxas aims at 128 registers.
    """
    if head_dim > 128:
        if sinks and arch == 90:
            return ExtendConfig(64, 32, 8, 1)
        return ExtendConfig(32, 32, 8, 1 if arch == 90 else 2)
    if arch != 90:
        return ExtendConfig(64, 32, 8, 2)
    if head_dim <= 64:
        return ExtendConfig(128, 64, 4, 2 if number.block else 3)
    return ExtendConfig(128, 128, 8, 2)


def extend_attention(
    q_extend: torch.Tensor,
    k_extend: torch.Tensor,
    v_extend: torch.Tensor,
    o_extend: torch.Tensor,
    k_buffer: PackedCache,
    v_buffer: PackedCache,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    custom_mask: torch.Tensor | None,
    is_causal: bool,
    mask_indptr: torch.Tensor | None,
    max_len_extend: int,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    sm_scale: float | None = None,
    logit_cap: float = 0.0,
    skip_prefix_custom_mask: bool = True,
    sliding_window_size: int = -1,
    sinks: torch.Tensor | None = None,
    window_kv_offsets: torch.Tensor | None = None,
    xai_temperature_len: int = -1,
    lse_extend: torch.Tensor | None = None,
    skip_prefix: bool = False,
    skip_extend: bool = False,
    page_size: int = 1,
    score_mod: Any = None,
    aux_tensors: Any = None,
    extend_seq_lens_cpu: Any = None,
    identity_kv_indices: bool = False,
) -> None:
    """Compute attention of new tokens over their cached prefix and over themselves, written to ``o_extend``.

    Args:
        q_extend: ``[T, Hq, D]``, the new tokens of all requests; the last two dimensions of this and the next three are contiguous.
        k_extend, v_extend: ``[T, H, D]`` without quantization, in the dtype of the queries.
        o_extend: ``[T, Hq, D]``.
        k_buffer, v_buffer: the layer's caches.
        qo_indptr: int ``[B + 1]``, where the tokens of each request begin.
        kv_indptr, kv_indices: int ``[B + 1]``, where the prefix of each request begins in the slots ``kv_indices``.
        is_causal: whether a new token sees only itself and new tokens before it.
        max_len_extend: the most new tokens of a request.
        sm_scale: factor of the logits, by default D^-1/2.
        logit_cap: tanh cap, 0 for none.
        sinks: ``[Hq]`` or None, a logit of each query head that counts in the softmax's denominator.
        sliding_window_size: a query sees keys at most that far behind; not positive for none.
        k_scale, v_scale: must be 1: the caches have their own scales.
        the rest: ignored, or not supported.

    Raises:
        NotImplementedError: a custom mask, a score modifier, a temperature by length, or parts of the result.
        ValueError: a shape or a scale that does not fit.
    """
    del mask_indptr, skip_prefix_custom_mask, window_kv_offsets, page_size, extend_seq_lens_cpu
    unserved(custom_mask=custom_mask, score_mod=score_mod, aux_tensors=aux_tensors, lse_extend=lse_extend)
    unserved(skip_prefix=skip_prefix, skip_extend=skip_extend, identity_kv_indices=identity_kv_indices)
    unserved(xai_temperature_len=xai_temperature_len if xai_temperature_len > 0 else None)
    tokens, query_heads, head_dim = q_extend.shape
    heads = k_buffer.shape[1]
    if query_heads % heads or head_dim != k_buffer.head_dim or k_extend.shape[1:] != (heads, head_dim):
        raise ValueError(
            f"queries {tuple(q_extend.shape)}, keys {tuple(k_extend.shape)}, cache {tuple(k_buffer.shape)}"
        )
    if any(x.stride()[1:] != (head_dim, 1) for x in (q_extend, k_extend, v_extend, o_extend)):
        raise ValueError("the last two dimensions of queries, keys, values and output must be contiguous")
    if (k_scale, v_scale) != (1.0, 1.0):
        raise ValueError(f"scales {k_scale}, {v_scale}: the caches have their own")
    check_sinks(sinks, query_heads)
    if tokens == 0 or max_len_extend == 0:
        return
    rotated = rotate_queries(q_extend.contiguous()) if k_buffer.rotated else q_extend
    unused = k_buffer.scale
    constants = options(q_extend, k_buffer)
    config = choose_for(k_buffer.format, head_dim, architecture(q_extend), sinks is not None)
    # Triton's interpreter multiplies the raw bits of bf16 operands: give it fp32.
    raw = _RAW[q_extend.dtype] if q_extend.is_cuda else tl.float32
    checked(
        extend_kernel[(len(qo_indptr) - 1, query_heads, triton.cdiv(max_len_extend, config.queries))](
            q_extend,
            rotated,
            k_extend,
            v_extend,
            o_extend,
            k_buffer.codes,
            k_buffer.scale,
            unused if k_buffer.bias is None else k_buffer.bias,
            v_buffer.codes,
            shared_scales(k_buffer, v_buffer),
            v_buffer.scale,
            unused if v_buffer.bias is None else v_buffer.bias,
            sinks,
            qo_indptr,
            kv_indptr,
            kv_indices,
            sm_scale or head_dim**-0.5,
            logit_cap,
            q_extend.stride(0),
            rotated.stride(0),
            k_extend.stride(0),
            v_extend.stride(0),
            o_extend.stride(0),
            H=heads,
            GROUP=query_heads // heads,
            CAP=logit_cap > 0,
            CAUSAL=is_causal,
            WINDOW=max(sliding_window_size, 0),
            RAW=raw,
            WGMMA=needs_drain(q_extend),
            BM=config.queries,
            BN=config.keys,
            num_warps=config.warps,
            num_stages=config.stages,
            **constants,
        )
    )
