"""Split-KV flash decoding with grouped queries: the packed cache is read once, for all query heads of a KV head.

With codes c, scales s and biases b a logit is ``q . (c s_k + b_k)`` and the output ``sum p c s_v + b_v``: the key bias adds one
value to all logits of a query, before the logit cap, and the value bias is added once, since the softmax weights sum to one.

A program computes some adjacent KV heads, one warp each: the heads of a token are contiguous in memory, and reading them together
reaches 1.5 times the bandwidth. Products are batched over the heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.attention.decode.load import load_fp8, load_planes, load_queries
from sglang_modelopt_kernels.attention.kernel import LOG2E, PLANES_DESCALE, capped, plane_channel, sink_weight

DESCALE = tl.constexpr(PLANES_DESCALE)


@triton.jit
def part_length(length, splits, BN: tl.constexpr, LEAST: tl.constexpr):
    """Return the tokens of each split of a request but the last: whole tiles, and at least LEAST."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, splits), BN) * BN, LEAST)


@triton.jit
def _bias_products(q, bias_ptr, channel, D: tl.constexpr, BH: tl.constexpr):
    """Multiply queries ``[BH, C, BG]`` by the biases of their KV heads at ``channel``, not summed over the channels."""
    at = tl.arange(0, BH)[:, None] * D + channel[None, :]
    bias = tl.load(bias_ptr + at, mask=(channel < D)[None, :], other=0.0)
    return q.to(tl.float32) * bias[:, :, None]


@triton.jit(do_not_specialize=["splits", "lse_token", "lse_head"])
def split_kernel(
    q_ptr,
    k_code_ptr,
    k_scale_ptr,
    k_bias_ptr,
    v_code_ptr,
    block_ptr,
    v_scale_ptr,
    kv_indptr,
    kv_indices,
    splits,
    partial_ptr,
    lse_ptr,
    sm_scale,
    cap,
    q_stride,
    partial_token,
    partial_head,
    partial_split,
    lse_token,
    lse_head,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    E: tl.constexpr,
    FP4: tl.constexpr,
    AFFINE: tl.constexpr,
    CAP: tl.constexpr,
    ASM: tl.constexpr,
    NATIVE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BH: tl.constexpr,
    BG: tl.constexpr,
    BN: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Compute one split of one request's tokens for BH KV heads and all GROUP query heads of each.

    Heads are the fastest grid axis, so that those of a request run at the same time.
    """
    head = tl.program_id(0) * BH
    request = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    first = tl.load(kv_indptr + request)
    length = tl.load(kv_indptr + request + 1) - first
    each = part_length(length, splits, BN, LEAST)
    start = split * each
    end = tl.minimum(start + each, length)
    if start >= end:
        return
    at = q_ptr + request * q_stride + head * GROUP * D
    channel = tl.arange(0, DP)
    at_plane = plane_channel(E)
    k_scale = tl.load(k_scale_ptr)
    shift = tl.zeros((BH, BG), tl.float32)
    bias_ptr = k_bias_ptr + head * D
    if FP4:
        q0 = load_queries(at, at_plane, GROUP, D, BH, BG, COMPUTE)
        q1 = load_queries(at, at_plane + 4, GROUP, D, BH, BG, COMPUTE)
        q2 = load_queries(at, at_plane + 8, GROUP, D, BH, BG, COMPUTE)
        q3 = load_queries(at, at_plane + 12, GROUP, D, BH, BG, COMPUTE)
        k_scale = k_scale * DESCALE
        if AFFINE:
            products = _bias_products(q0, bias_ptr, at_plane, D, BH) + _bias_products(q1, bias_ptr, at_plane + 4, D, BH)
            products += _bias_products(q2, bias_ptr, at_plane + 8, D, BH)
            products += _bias_products(q3, bias_ptr, at_plane + 12, D, BH)
            shift = tl.sum(products, axis=1)
        a0 = tl.zeros((BH, E, BG), tl.float32)
        a1 = tl.zeros((BH, E, BG), tl.float32)
        a2 = tl.zeros((BH, E, BG), tl.float32)
        a3 = tl.zeros((BH, E, BG), tl.float32)
    else:
        q0 = load_queries(at, channel, GROUP, D, BH, BG, COMPUTE)
        if AFFINE:
            shift = tl.sum(_bias_products(q0, bias_ptr, channel, D, BH), axis=1)
        a0 = tl.zeros((BH, DP, BG), tl.float32)
    k_scale *= sm_scale
    shift *= sm_scale
    if not CAP:
        # Fold log2(e) into the scale: logits are exponents of two.
        k_scale *= LOG2E
        shift *= LOG2E
    largest = tl.full((BH, BG), -float("inf"), tl.float32)
    # One sum for each token of the tile, reduced once after the loop.
    totals = tl.zeros((BH, BN, BG), tl.float32)
    for offset in range(start, end, BN):
        token = offset + tl.arange(0, BN)
        # Past the end the last token is read again, with weight zero: no mask on the data.
        slot = tl.load(kv_indices + first + tl.minimum(token, end - 1)).to(tl.int64)
        if FP4:
            k0, k1, k2, k3 = load_planes(k_code_ptr, block_ptr, slot, head, 0, H, D, E, BH, BN, ASM, COMPUTE, False)
            s = tl.dot(k0, q0, input_precision="ieee")
            s = tl.dot(k1, q1, s, input_precision="ieee")
            s = tl.dot(k2, q2, s, input_precision="ieee")
            s = tl.dot(k3, q3, s, input_precision="ieee")
        else:
            k = load_fp8(k_code_ptr, slot, head, H, D, DP, BH, NATIVE, COMPUTE)
            s = tl.dot(k, q0, input_precision="ieee")
        s = s * k_scale + shift[:, None, :]
        if CAP:
            s = capped(s, cap, CAP) * LOG2E
        s = tl.where((token < end)[None, :, None], s, -float("inf"))
        m_new = tl.maximum(largest, tl.max(s, axis=1))
        alpha = tl.exp2(largest - m_new)
        weight = tl.exp2(s - m_new[:, None, :])
        totals = totals * alpha[:, None, :] + weight
        largest = m_new
        p = weight.to(COMPUTE)
        if FP4:
            v0, v1, v2, v3 = load_planes(v_code_ptr, block_ptr, slot, head, 1, H, D, E, BH, BN, ASM, COMPUTE, True)
            a0 = tl.dot(v0, p, a0 * alpha[:, None, :], input_precision="ieee")
            a1 = tl.dot(v1, p, a1 * alpha[:, None, :], input_precision="ieee")
            a2 = tl.dot(v2, p, a2 * alpha[:, None, :], input_precision="ieee")
            a3 = tl.dot(v3, p, a3 * alpha[:, None, :], input_precision="ieee")
        else:
            v = load_fp8(v_code_ptr, slot, head, H, D, DP, BH, NATIVE, COMPUTE)
            a0 = tl.dot(tl.permute(v, (0, 2, 1)), p, a0 * alpha[:, None, :], input_precision="ieee")
    total = tl.sum(totals, axis=1)
    group = tl.arange(0, BG)
    inside = (group < GROUP)[None, :]
    query_head = (head + tl.arange(0, BH))[:, None] * GROUP + group[None, :]
    out = partial_ptr + request * partial_token + split * partial_split + query_head[:, None, :] * partial_head
    v_scale = tl.load(v_scale_ptr)
    if FP4:
        factor = (v_scale * DESCALE / total)[:, None, :]
        mask = inside[:, None, :] & (at_plane < D)[None, :, None]
        out += at_plane[None, :, None]
        tl.store(out, a0 * factor, mask=mask)
        tl.store(out + 4, a1 * factor, mask=mask)
        tl.store(out + 8, a2 * factor, mask=mask)
        tl.store(out + 12, a3 * factor, mask=mask)
    else:
        mask = inside[:, None, :] & (channel < D)[None, :, None]
        tl.store(out + channel[None, :, None], a0 * (v_scale / total)[:, None, :], mask=mask)
    at_lse = lse_ptr + request * lse_token + query_head * lse_head + split
    tl.store(at_lse, largest + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["splits", "lse_token", "lse_head"])
def merge_kernel(
    partial_ptr,
    lse_ptr,
    v_bias_ptr,
    sink_ptr,
    kv_indptr,
    splits,
    out_ptr,
    partial_token,
    partial_head,
    partial_split,
    lse_token,
    lse_head,
    out_stride,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    AFFINE: tl.constexpr,
    BN: tl.constexpr,
    LEAST: tl.constexpr,
    BP: tl.constexpr,
):
    """Merge the splits of one request and query head, BP at a time, by their shares of the softmax; zero without tokens.

    The splits know nothing of attention sinks: that of the head, if ``sink_ptr`` is not None, is added here.
    """
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    channel = tl.arange(0, DP)
    inside = channel < D
    length = tl.load(kv_indptr + request + 1) - tl.load(kv_indptr + request)
    each = part_length(length, splits, BN, LEAST)
    parts = tl.cdiv(length, each)
    if AFFINE:
        # Load early, to overlap with the loads of the splits.
        bias = tl.load(v_bias_ptr + (head // GROUP) * D + channel, mask=inside, other=0.0)
    lse_ptr += request * lse_token + head * lse_head
    partial_ptr += request * partial_token + head * partial_head
    largest = -float("inf")
    total = 0.0
    acc = tl.zeros((DP,), tl.float32)
    for first in range(0, parts, BP):
        part = first + tl.arange(0, BP)
        lse = tl.load(lse_ptr + part, mask=part < parts, other=-float("inf"))
        at = partial_ptr + part[:, None] * partial_split + channel[None, :]
        values = tl.load(at, mask=(part < parts)[:, None] & inside[None, :], other=0.0)
        m_new = tl.maximum(largest, tl.max(lse, axis=0))
        alpha = tl.exp2(largest - m_new)
        weight = tl.exp2(lse - m_new)
        acc = acc * alpha + tl.sum(values * weight[:, None], axis=0)
        total = total * alpha + tl.sum(weight, axis=0)
        largest = m_new
    if sink_ptr is not None:
        if AFFINE:
            # The weights of the values do not sum to one: their bias enters before the sink does.
            acc += total * bias
        total += sink_weight(sink_ptr + head, largest)
    out = acc / tl.where(total == 0.0, 1.0, total)
    if AFFINE and sink_ptr is None:
        out += tl.where(length > 0, bias, 0.0)
    at = out_ptr + request * out_stride + head * D + channel
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)
