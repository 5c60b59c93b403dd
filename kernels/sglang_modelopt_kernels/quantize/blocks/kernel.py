"""Rounding of activations under block scales: one read, one write of codes and scales or of values."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.quantize.kernel import e2m1_code, e4m3_byte, round_to_e4m3


@triton.jit
def _e2m1_value(code):
    """Decode E2M1 codes to fp32, minus zero included."""
    m = code & 7
    # From 1 on, exponent and mantissa in fp32's place; below 1, multiples of 0.5.
    normal = ((m << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(m >= 2, normal, m.to(tl.float32) * 0.5)
    return (value.to(tl.uint32, bitcast=True) | ((code & 8) << 28).to(tl.uint32)).to(tl.float32, bitcast=True)


@triton.jit
def _ue8m0_byte(quotient):
    """Return the UE8M0 byte of the least power of two that is at least ``quotient``, which is finite and not negative."""
    bits = quotient.to(tl.int32, bitcast=True)
    exponent, mantissa = bits >> 23, bits & 0x007FFFFF
    # A subnormal is above 2^-127, byte 0, where its mantissa is above half of the range.
    rounds_up = tl.where(exponent == 0, mantissa > 0x00400000, mantissa != 0)
    return exponent + rounds_up.to(tl.int32)


@triton.jit
def _power_of_two(byte):
    """Decode UE8M0 to fp32: ``2^(byte - 127)`` for bytes 0 to 254, NaN for 255."""
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def quantize_blocks_kernel(
    x_ptr,
    smoothing_ptr,
    input_scale_ptr,
    y_ptr,
    scale_ptr,
    k,
    stride,
    scale_columns,
    GROUP: tl.constexpr,
    ELEMENT: tl.constexpr,
    SMOOTH: tl.constexpr,
    VALUES: tl.constexpr,
    SWIZZLE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Round BLOCKS blocks of one token. GROUP 16 is NVFP4; 32 is MX, its elements E2M1 or E4M3 by ELEMENT ("e2m1" or "e4m3").

    Write codes to ``y`` (two to a byte, or a byte each) and their scales to ``scale``. With VALUES write code times block scale to
    ``y`` instead, without NVFP4's ``input_scale``, and no scales. With SWIZZLE the scales get the 128x4 swizzled layout
    (:func:`naive_swizzle`), ``scale_columns`` / 4 tiles in a row.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + token * stride + column, mask=column < k, other=0.0).to(tl.float32)
    if SMOOTH:
        x = x * tl.load(smoothing_ptr + column, mask=column < k, other=0.0).to(tl.float32)
    # Compared as integers, NaN is above infinity and infinity above every finite value: the maximum keeps both.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    finite = largest < 0x7F800000
    amax = tl.where(finite, largest, 0).to(tl.float32, bitcast=True)
    if GROUP == 16:
        input_scale = tl.load(input_scale_ptr)
        rounded = round_to_e4m3(tl.div_rn(amax, tl.zeros_like(amax) + 6.0 * input_scale))
        scale = tl.where(finite, rounded, float("nan"))
        byte = e4m3_byte(scale, rounded)
        step = scale * input_scale
        step = tl.where(step == 0.0, float("inf"), step)  # the block is zero: give it code 0
        x = tl.div_rn(x, tl.broadcast_to(step[:, None], (BLOCKS, GROUP)))
    else:
        quotient = tl.div_rn(amax, tl.zeros_like(amax) + (6.0 if ELEMENT == "e2m1" else 448.0))
        byte = tl.where(finite, _ue8m0_byte(quotient), 255)
        scale = _power_of_two(byte)
        # Exact: the product with the reciprocal of a power of two is the quotient.
        x = x * _power_of_two(tl.where(byte == 255, 255, 254 - byte))[:, None]
    if ELEMENT == "e2m1":
        codes = e2m1_code(x)
        values = _e2m1_value(codes)
    else:
        values = round_to_e4m3(x)
        codes = e4m3_byte(values, x)
    if VALUES:
        y = (values * scale[:, None]).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + token * k + column, y, mask=column < k)
    else:
        if ELEMENT == "e2m1":
            low, high = tl.split(tl.reshape(codes, (BLOCKS, GROUP // 2, 2)))
            pair = block[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
            tl.store(y_ptr + token * (k // 2) + pair, (low | high << 4).to(tl.uint8), mask=pair < k // 2)
        else:
            tl.store(y_ptr + token * k + column, codes, mask=column < k)
        if SWIZZLE:
            tile = (token // 128) * (scale_columns // 4) + block // 4
            at = tile * 512 + (token % 32) * 16 + (token % 128) // 32 * 4 + block % 4
        else:
            at = token * scale_columns + block
        tl.store(scale_ptr + at, byte.to(tl.uint8), mask=block < k // GROUP)
