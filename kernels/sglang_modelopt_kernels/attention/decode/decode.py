"""Launch of decode attention, with the arguments of SGLang's ``decode_attention_fwd``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from sglang_modelopt_kernels.attention.decode.kernel import merge_kernel, split_kernel
from sglang_modelopt_kernels.attention.launch import architecture, check_sinks, options, shared_scales, unserved
from sglang_modelopt_kernels.attention.packed import PackedCache
from sglang_modelopt_kernels.attention.store.store import rotate_queries
from sglang_modelopt_kernels.formats.kv_cache import KVFormat
from sglang_modelopt_kernels.gemm.common import checked

RESIDENT = 8
"""Target resident splits (one warp each) per SM: the fastest of 4 to 16 on an H100, except for FP8 in large batches, which is up to
3 % faster with 16."""

MOST_SPLITS = 128
"""Splits of a request, at most: merging more takes longer than they save."""

LEAST_TOKENS = 128
"""Tokens of a split, at the least: a multiple of every configuration's tile."""

MERGED = 64
"""Splits that the merging kernel reads at a time, at most."""

LEAST_QUERIES = 8
"""Smallest N of a matrix instruction."""


@dataclass(frozen=True)
class DecodeConfig:
    """Tokens and KV heads that a program reads at a time, one warp for each head, and pipeline stages.

    The address of a tile depends on the indices of its tokens: five stages keep two tiles in flight, three one.
    """

    tokens: int
    heads: int
    stages: int


def count_splits(requests: int, heads: int, sms: int) -> int:
    """Return the splits of each request for a GPU of ``sms`` SMs: as many as fill one wave of programs, or four below two.

    A partial second wave would leave most of the GPU idle. One split where requests and heads make eight waves or more: they need
    no splits, and their scratch would be large. A split has at least :data:`LEAST_TOKENS` tokens, so that short requests use
    fewer.
    """
    wave = RESIDENT * sms
    if requests * heads >= 8 * wave:
        return 1
    splits = wave // (requests * heads)
    return min(MOST_SPLITS, splits if splits >= 2 else 4)


class DecodeScratch:
    """Scratch for the splits of any batch of at most ``most_requests`` requests, in one allocation that captured graphs keep.

    Args:
        most_requests: the largest batch.
        query_heads, heads: query heads and KV heads.
        head_dim: D.
        sms: SMs of the GPU.

    Raises:
        ValueError: :meth:`of` is asked for a larger batch.
    """

    def __init__(
        self,
        most_requests: int,
        query_heads: int,
        heads: int,
        head_dim: int,
        sms: int,
        device: torch.device | str,
    ) -> None:
        self.most_requests, self.heads, self.sms = most_requests, heads, sms
        parts = max(requests * count_splits(requests, heads, sms) for requests in range(1, most_requests + 1))
        self.partial = torch.empty((parts * query_heads, head_dim), dtype=torch.float32, device=device)
        self.lse = torch.empty(parts * query_heads, dtype=torch.float32, device=device)

    def of(self, requests: int, query_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scratch of :func:`decode_attention` for a batch: ``[B, Hq, splits, D]`` and ``[B, Hq, splits]``."""
        if requests > self.most_requests:
            raise ValueError(f"scratch for {self.most_requests} requests, not {requests}")
        splits = count_splits(requests, self.heads, self.sms)
        shape = (requests, query_heads, splits)
        rows = requests * query_heads * splits
        return self.partial[:rows].view(*shape, -1), self.lse[:rows].view(shape)


TOGETHER = 256
"""Channels of a token that a program reads, of as many heads as have them."""


def choose_for(number: KVFormat, head_dim: int, heads: int, arch: int | None) -> DecodeConfig:
    """Return the configuration for a format and number of KV heads, the same for every batch.

    Chosen on an H100, over 1 to 128 requests of 1024 to 131072 tokens; compiled for the other architectures without spilling.
    """
    together = math.gcd(heads, 1 << max(1, TOGETHER // head_dim).bit_length() - 1)  # a power of two
    if number.block:
        return DecodeConfig(32, together, 5)
    tokens = 64 if head_dim <= 128 else 32
    # Without E4M3 conversion instructions (before SM89) twice as many tokens spill, except at head_dim 64.
    return DecodeConfig(tokens if head_dim <= 64 or (arch or 89) >= 89 else tokens // 2, together, 1)


def decode_attention(
    q: torch.Tensor,
    k_buffer: PackedCache,
    v_buffer: PackedCache,
    o: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    attn_logits: torch.Tensor,
    attn_lse: torch.Tensor,
    num_kv_splits: torch.Tensor | None,
    max_kv_splits: int,
    sm_scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    xai_temperature_len: int = -1,
    has_mla: bool = False,
    use_pdl: bool = False,
    page_size: int = 1,
    score_mod: Any = None,
    aux_tensors: Any = None,
    enable_lean: bool | None = None,
    **lean: Any,
) -> None:
    """Compute attention of one query of each request over its cached tokens, written to ``o``.

    Args:
        q: ``[B, Hq, D]``, contiguous in its last two dimensions.
        k_buffer, v_buffer: the layer's caches of H heads; H divides Hq.
        o: ``[B, Hq, D]``, contiguous in its last two dimensions.
        kv_indptr: int ``[B + 1]``, where each request's tokens begin in ``kv_indices``.
        kv_indices: slots of tokens.
        attn_logits: float32 ``[>= B, Hq, splits, D]``, scratch.
        attn_lse: float32 ``[>= B, Hq, splits]``, scratch.
        max_kv_splits: splits of each request's tokens.
        sm_scale: factor of the logits.
        logit_cap: tanh cap, 0 for none.
        sinks: ``[Hq]`` or None, a logit of each query head that counts in the softmax's denominator.
        k_scale, v_scale: must be 1: the caches have their own scales.
        num_kv_splits, page_size, use_pdl, enable_lean and the rest: ignored.

    Raises:
        NotImplementedError: a score modifier, a temperature by length or MLA is asked for.
        ValueError: a shape or a scale that does not fit.
    """
    del num_kv_splits, use_pdl, page_size, enable_lean, lean
    unserved(score_mod=score_mod, aux_tensors=aux_tensors, has_mla=has_mla)
    unserved(xai_temperature_len=xai_temperature_len if xai_temperature_len > 0 else None)
    requests, query_heads, head_dim = q.shape
    heads = k_buffer.shape[1]
    if query_heads % heads or head_dim != k_buffer.head_dim or q.stride()[1:] != (head_dim, 1):
        raise ValueError(f"queries {tuple(q.shape)}, strides {q.stride()}, for a cache {tuple(k_buffer.shape)}")
    if (k_scale, v_scale) != (1.0, 1.0) or attn_logits.shape[2] != max_kv_splits or o.stride()[1:] != (head_dim, 1):
        raise ValueError(f"scales {k_scale}, {v_scale}, {attn_logits.shape[2]} splits, strides {o.stride()}")
    check_sinks(sinks, query_heads)
    if requests == 0:
        return
    constants = options(q, k_buffer)
    config = choose_for(k_buffer.format, head_dim, heads, architecture(q))
    group = query_heads // heads
    rotated = rotate_queries(q.contiguous()) if k_buffer.rotated else q
    strides = (*attn_logits.stride()[:3], *attn_lse.stride()[:2])
    unused = k_buffer.scale
    checked(
        split_kernel[(heads // config.heads, requests, max_kv_splits)](
            rotated,
            k_buffer.codes,
            k_buffer.scale,
            unused if k_buffer.bias is None else k_buffer.bias,
            v_buffer.codes,
            shared_scales(k_buffer, v_buffer),
            v_buffer.scale,
            kv_indptr,
            kv_indices,
            max_kv_splits,
            attn_logits,
            attn_lse,
            sm_scale,
            logit_cap,
            rotated.stride(0),
            *strides,
            H=heads,
            GROUP=group,
            CAP=logit_cap > 0,
            BH=config.heads,
            BG=max(LEAST_QUERIES, 1 << (group - 1).bit_length()),
            BN=config.tokens,
            LEAST=LEAST_TOKENS,
            num_warps=config.heads,
            num_stages=config.stages,
            **constants,
        )
    )
    merge_kernel[(requests, query_heads)](
        attn_logits,
        attn_lse,
        unused if v_buffer.bias is None else v_buffer.bias,
        sinks,
        kv_indptr,
        max_kv_splits,
        o,
        *strides,
        o.stride(0),
        GROUP=group,
        D=head_dim,
        DP=constants["DP"],
        AFFINE=v_buffer.bias is not None,
        BN=config.tokens,
        LEAST=LEAST_TOKENS,
        BP=min(MERGED, triton.next_power_of_2(max_kv_splits)),
        num_warps=4,
    )
