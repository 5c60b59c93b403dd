"""Store of keys and values of new tokens: bias, rotation, rounding and packing in registers. And the rotation of queries."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.attention.kernel import rotated
from sglang_modelopt_kernels.quantize.kernel import e2m1_code, e4m3_byte, round_to_e4m3


@triton.jit
def _store_nvfp4(
    x, row, inside, code_ptr, scale_ptr, s, SIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr
):
    """Round vectors ``x`` ``[BT, DP]`` to NVFP4 and store codes and block scales of the keys (SIDE 0) or the values (1)."""
    blocks = tl.reshape(x, (BT, DP // 16, 16))
    magnitude = tl.abs(blocks)
    # A maximum may lose a NaN. Neither NaN nor infinity is at most the largest finite fp32.
    spoiled = tl.max(tl.where(magnitude <= 3.4028234663852886e38, 0, 1), axis=2)
    ratio = tl.div_rn(tl.max(magnitude, axis=2), 6.0 * s)
    scale = round_to_e4m3(tl.where(spoiled == 0, ratio, float("nan")))
    step = scale * s
    divisor = tl.where(step == 0.0, float("inf"), step)
    code = e2m1_code(tl.div_rn(blocks, tl.broadcast_to(divisor[:, :, None], (BT, DP // 16, 16))))
    # Planes: axis 2 is the plane, axis 3 the element in its group of four.
    code = tl.reshape(code, (BT, DP // 16, 4, 4))
    plane = tl.arange(0, 4)[None, None, :, None]
    sign_bit = tl.where(plane == 0, 15, tl.where(plane == 1, 12, tl.where(plane == 2, 14, 13)))
    word = tl.sum(((code & 8) >> 3) << sign_bit | (code & 7) << (9 - 3 * plane), axis=2)
    word = tl.reshape(word, (BT, DP // 4))
    element = tl.arange(0, DP // 4)
    at = code_ptr + row[:, None] * (D // 4) + element[None, :]
    tl.store(at, word.to(tl.int16), mask=inside[:, None] & (element < D // 4)[None, :])
    block = tl.arange(0, DP // 16)
    at = scale_ptr + (2 * row + SIDE)[:, None] * (D // 16) + block[None, :]
    # NaN as 0xFF, which is NaN in float16 when it is read.
    byte = tl.where(spoiled == 0, e4m3_byte(scale, scale), 0xFF).to(tl.uint8)
    tl.store(at, byte, mask=inside[:, None] & (block < D // 16)[None, :])


@triton.jit
def store_kernel(
    k_ptr,
    v_ptr,
    slot_ptr,
    k_code_ptr,
    k_scale_ptr,
    k_bias_ptr,
    v_code_ptr,
    block_ptr,
    v_scale_ptr,
    v_bias_ptr,
    tokens,
    k_stride,
    v_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SIZE: tl.constexpr,
    FP4: tl.constexpr,
    AFFINE: tl.constexpr,
    ROTATE: tl.constexpr,
    NATIVE: tl.constexpr,
    BT: tl.constexpr,
):
    """Store BT tokens of one head, of the keys (grid axis 2 = 0) or of the values (1)."""
    head = tl.program_id(1)
    is_value = tl.program_id(2)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = token < tokens
    channel = tl.arange(0, DP)
    mask = inside[:, None] & (channel < D)[None, :]
    slot = tl.load(slot_ptr + token, mask=inside, other=0).to(tl.int64)
    row = slot * H + head
    token = token.to(tl.int64)
    if is_value == 0:
        source = tl.load(k_ptr + token[:, None] * k_stride + head * D + channel[None, :], mask=mask, other=0.0)
        x = source.to(tl.float32)
        if ROTATE:
            x = rotated(source, DP, SIZE, NATIVE)
        if AFFINE:
            x = x - tl.load(k_bias_ptr + head * D + channel, mask=channel < D, other=0.0)[None, :]
        s = tl.load(k_scale_ptr)
        if FP4:
            _store_nvfp4(x, row, inside, k_code_ptr, block_ptr, s, 0, D, DP, BT)
        else:
            y = e4m3_byte(round_to_e4m3(x * tl.div_rn(1.0, s)), x)
            tl.store(k_code_ptr + row[:, None] * D + channel[None, :], y, mask=mask)
    else:
        x = tl.load(v_ptr + token[:, None] * v_stride + head * D + channel[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        if AFFINE:
            x = x - tl.load(v_bias_ptr + head * D + channel, mask=channel < D, other=0.0)[None, :]
        s = tl.load(v_scale_ptr)
        if FP4:
            _store_nvfp4(x, row, inside, v_code_ptr, block_ptr, s, 1, D, DP, BT)
        else:
            y = e4m3_byte(round_to_e4m3(x * tl.div_rn(1.0, s)), x)
            tl.store(v_code_ptr + row[:, None] * D + channel[None, :], y, mask=mask)


@triton.jit
def turn_kernel(
    q_ptr, y_ptr, rows, D: tl.constexpr, DP: tl.constexpr, SIZE: tl.constexpr, NATIVE: tl.constexpr, BT: tl.constexpr
):
    """Rotate BT queries of ``[rows, D]`` by the normalized Hadamard matrix. Results files name this kernel: keep its name."""
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    channel = tl.arange(0, DP)
    mask = (row < rows)[:, None] & (channel < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + channel[None, :]
    y = rotated(tl.load(q_ptr + at, mask=mask, other=0.0), DP, SIZE, NATIVE)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
