"""Flash attention of new tokens: first over the packed prefix, then over the new tokens themselves, in one softmax.

Only the prefix has biases: its logits get ``q . b_k``, and ``b_v`` enters with the prefix's share of the softmax, the running sum
at the end of the first loop. Rotated keys of the prefix are multiplied by rotated queries, new keys by queries that are not
rotated.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.attention.kernel import (
    LOG2E,
    PLANES_DESCALE,
    capped,
    load_fp8,
    load_planes,
    plane_channel,
    sink_weight,
)
from sglang_modelopt_kernels.gemm.common.kernel import drain_wgmma

DESCALE = tl.constexpr(PLANES_DESCALE)


@triton.jit
def _load_query(q_ptr, at, channel, inside, D: tl.constexpr, COMPUTE: tl.constexpr):
    """Load queries at ``channel``, zero past the last token and past D."""
    mask = inside[:, None] & (channel < D)[None, :]
    return tl.load(q_ptr + at[:, None] + channel[None, :], mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def _bias_product(q, bias_ptr, channel, D: tl.constexpr):
    """Multiply queries by the key bias at ``channel``, summed over these channels."""
    bias = tl.load(bias_ptr + channel, mask=channel < D, other=0.0)
    return tl.sum(q.to(tl.float32) * bias[None, :], axis=1)


@triton.jit
def _rescaled(s, largest):
    """Return the new running maximum ``m_new``, the factor ``alpha`` of earlier sums, and the softmax weights of ``s``.

    A row without any key so far has a maximum of minus infinity, and weights of zero.
    """
    m_new = tl.maximum(largest, tl.max(s, axis=1))
    floor = tl.where(m_new == -float("inf"), 0.0, m_new)
    return m_new, tl.exp2(largest - floor), tl.exp2(s - floor[:, None])


@triton.jit
def extend_kernel(
    q_ptr,
    rotated_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    k_code_ptr,
    k_scale_ptr,
    k_bias_ptr,
    v_code_ptr,
    block_ptr,
    v_scale_ptr,
    v_bias_ptr,
    sink_ptr,
    qo_indptr,
    kv_indptr,
    kv_indices,
    sm_scale,
    cap,
    q_stride,
    rotated_stride,
    k_stride,
    v_stride,
    out_stride,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    E: tl.constexpr,
    FP4: tl.constexpr,
    AFFINE: tl.constexpr,
    CAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    ASM: tl.constexpr,
    NATIVE: tl.constexpr,
    COMPUTE: tl.constexpr,
    RAW: tl.constexpr,
    WGMMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute BM new tokens of one request for one query head; ``sink_ptr`` is None without attention sinks."""
    request = tl.program_id(0)
    query_head = tl.program_id(1)
    head = query_head // GROUP
    begin = tl.load(qo_indptr + request)
    new = tl.load(qo_indptr + request + 1) - begin
    first = tl.load(kv_indptr + request)
    prefix = tl.load(kv_indptr + request + 1) - first
    place = tl.program_id(2) * BM
    if place >= new:
        return
    local = place + tl.arange(0, BM)
    inside = local < new
    token = (begin + local).to(tl.int64)
    channel = tl.arange(0, DP)
    at_plane = plane_channel(E)
    at = token * rotated_stride + query_head * D
    k_scale = tl.load(k_scale_ptr)
    shift = tl.zeros((BM,), tl.float32)
    if FP4:
        q0 = _load_query(rotated_ptr, at, at_plane, inside, D, COMPUTE)
        q1 = _load_query(rotated_ptr, at, at_plane + 4, inside, D, COMPUTE)
        q2 = _load_query(rotated_ptr, at, at_plane + 8, inside, D, COMPUTE)
        q3 = _load_query(rotated_ptr, at, at_plane + 12, inside, D, COMPUTE)
        k_scale = k_scale * DESCALE
        if AFFINE:
            bias_ptr = k_bias_ptr + head * D
            shift = _bias_product(q0, bias_ptr, at_plane, D) + _bias_product(q1, bias_ptr, at_plane + 4, D)
            shift += _bias_product(q2, bias_ptr, at_plane + 8, D) + _bias_product(q3, bias_ptr, at_plane + 12, D)
        a0 = tl.zeros((BM, E), tl.float32)
        a1 = tl.zeros((BM, E), tl.float32)
        a2 = tl.zeros((BM, E), tl.float32)
        a3 = tl.zeros((BM, E), tl.float32)
    else:
        q0 = _load_query(rotated_ptr, at, channel, inside, D, COMPUTE)
        if AFFINE:
            shift = _bias_product(q0, k_bias_ptr + head * D, channel, D)
        a0 = tl.zeros((BM, DP), tl.float32)
    largest = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(prefix + place - WINDOW, 0) // BN * BN
    for offset in range(start, prefix, BN):
        key = offset + tl.arange(0, BN)
        slot = tl.load(kv_indices + first + tl.minimum(key, prefix - 1)).to(tl.int64)
        row = slot * H + head
        if FP4:
            k0, k1, k2, k3 = load_planes(k_code_ptr, block_ptr, slot, head, 0, H, D, E, BN, ASM, COMPUTE)
            s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
            s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
            s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee")
            s = tl.dot(q3, tl.trans(k3), s, input_precision="ieee")
        else:
            k = load_fp8(k_code_ptr, row, D, DP, NATIVE, COMPUTE)
            s = tl.dot(q0, tl.trans(k), input_precision="ieee")
        s = (s * k_scale + shift[:, None]) * sm_scale
        s = capped(s, cap, CAP) * LOG2E
        seen = (key < prefix)[None, :] & inside[:, None]
        if WINDOW > 0:
            seen = seen & ((prefix + local)[:, None] <= key[None, :] + WINDOW)
        largest, alpha, weight = _rescaled(tl.where(seen, s, -float("inf")), largest)
        total = total * alpha + tl.sum(weight, axis=1)
        p = weight.to(COMPUTE)
        if FP4:
            v0, v1, v2, v3 = load_planes(v_code_ptr, block_ptr, slot, head, 1, H, D, E, BN, ASM, COMPUTE)
            a0 = tl.dot(p, v0, a0 * alpha[:, None], input_precision="ieee")
            a1 = tl.dot(p, v1, a1 * alpha[:, None], input_precision="ieee")
            a2 = tl.dot(p, v2, a2 * alpha[:, None], input_precision="ieee")
            a3 = tl.dot(p, v3, a3 * alpha[:, None], input_precision="ieee")
        else:
            v = load_fp8(v_code_ptr, row, D, DP, NATIVE, COMPUTE)
            a0 = tl.dot(p, v, a0 * alpha[:, None], input_precision="ieee")
    v_scale = tl.load(v_scale_ptr)
    if FP4:
        # Element e of plane q is channel 16 (e / 4) + 4 q + e % 4.
        planes = tl.join(tl.join(a0, a2), tl.join(a1, a3))
        planes = tl.permute(tl.reshape(planes, (BM, E // 4, 4, 4)), (0, 1, 3, 2))
        acc = tl.reshape(planes, (BM, 4 * E)) * (v_scale * DESCALE)
    else:
        acc = a0 * v_scale
    if AFFINE:
        bias = tl.load(v_bias_ptr + head * D + channel, mask=channel < D, other=0.0)
        acc += total[:, None] * bias[None, :]

    q = _load_query(q_ptr, token * q_stride + query_head * D, channel, inside, D, RAW)
    end = new
    if CAUSAL:
        end = tl.minimum(new, place + BM)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(place - WINDOW, 0) // BN * BN
    for offset in range(start, end, BN):
        drain_wgmma(offset, WGMMA)
        key = offset + tl.arange(0, BN)
        source = (begin + tl.minimum(key, new - 1)).to(tl.int64)
        mask = (channel < D)[None, :]
        k = tl.load(k_ptr + source[:, None] * k_stride + head * D + channel[None, :], mask=mask, other=0.0).to(RAW)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * sm_scale
        s = capped(s, cap, CAP) * LOG2E
        seen = (key < end)[None, :] & inside[:, None]
        if CAUSAL:
            seen = seen & (key[None, :] <= local[:, None])
        if WINDOW > 0:
            seen = seen & (local[:, None] <= key[None, :] + WINDOW)
            if not CAUSAL:
                seen = seen & (key[None, :] <= local[:, None] + WINDOW)
        largest, alpha, weight = _rescaled(tl.where(seen, s, -float("inf")), largest)
        total = total * alpha + tl.sum(weight, axis=1)
        v = tl.load(v_ptr + source[:, None] * v_stride + head * D + channel[None, :], mask=mask, other=0.0).to(RAW)
        acc = tl.dot(weight.to(RAW), v, acc * alpha[:, None], input_precision="ieee")
    if sink_ptr is not None:
        total += sink_weight(sink_ptr + query_head, largest)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = token[:, None] * out_stride + query_head * D + channel[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (channel < D)[None, :])
