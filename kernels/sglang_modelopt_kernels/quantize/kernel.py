"""Device functions that round to E4M3 and E2M1 in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to_e4m3(x):
    """Round fp32 to E4M3 values in fp32: nearest, ties to even, saturating at 448; NaN stays NaN.

    By arithmetic on fp32, because SM80 has no E4M3 and the cast of Triton's interpreter does not round to nearest. Adding and
    subtracting 1.5 * 2^23 quanta rounds to the quantum: 2^-9 below 2^-6, and 2^(e - 3) under the exponent e above.
    """
    bits = x.to(tl.uint32, bitcast=True)
    exponent = tl.maximum((bits >> 23) & 0xFF, 121)  # 121 is 2^-6; its quantum has exponent 118
    magic = (((exponent + 20) << 23) | 0x00400000).to(tl.float32, bitcast=True)
    clamped = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    return tl.where(exponent > 135, clamped, (clamped + magic) - magic)


@triton.jit
def e4m3_byte(y, x):
    """Convert E4M3 values ``y`` in fp32 to bytes, with the sign of ``x``, from which they were rounded; NaN is 0x7F."""
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude >> 20) - ((127 - 7) << 3)
    small = (tl.abs(y) * 512.0).to(tl.uint32)  # subnormals, in units of 2^-9
    byte = tl.where(magnitude >= 0x3C800000, normal, small)
    byte = byte | ((x.to(tl.uint32, bitcast=True) >> 24) & 0x80)
    return tl.where(magnitude > 0x7F800000, 0x7F, byte).to(tl.uint8)


@triton.jit
def e2m1_code(x):
    """Round fp32 to E2M1 codes, ties to even, saturating at 6; the code of a NaN is undefined."""
    m = tl.abs(x)
    code = (m > 0.25).to(tl.int32) + (m >= 0.75).to(tl.int32) + (m > 1.25).to(tl.int32) + (m >= 1.75).to(tl.int32)
    code += (m > 2.5).to(tl.int32) + (m >= 3.5).to(tl.int32) + (m > 5.0).to(tl.int32)
    return code | tl.where(x < 0, 8, 0)
