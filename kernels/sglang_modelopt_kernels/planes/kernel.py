"""Decoding planes in registers, for kernels of every kind."""

from __future__ import annotations

import triton
import triton.language as tl


def planes_of(text: str, registers: str, words: int) -> str:
    """Assembly that runs ``text`` for each of ``words`` words of elements ``{w}`` under scales ``{s}``, to a word of each plane.

    Of a plane the words follow each other. Several are a matrix instruction's fragment; each plane is given them again.
    """
    given = 1 if words == 1 else 4 * words
    parts = []
    for word in range(words):
        planes = {f"p{plane}": f"${plane * words + word}" for plane in range(4)}
        parts.append(text.format(w=f"${4 * words + word}", s=f"${4 * words + given + word}", **planes))
    return "{ " + registers + "\n" + "\n".join(parts) + " }"


_FLOAT16 = """and.b32 a, {w}, 0x8e008e00;
    mul.rn.f16x2 {p0}, a, {s};
    shl.b32 a, {w}, 3;
    and.b32 a, a, 0x8e008e00;
    mul.rn.f16x2 {p1}, a, {s};
    shl.b32 a, {w}, 6;
    and.b32 a, a, 0x0e000e00;
    shl.b32 b, {w}, 1;
    lop3.b32 a, b, 0x80008000, a, 0xea;
    mul.rn.f16x2 {p2}, a, {s};
    shl.b32 a, {w}, 9;
    and.b32 a, a, 0x0e000e00;
    shl.b32 b, {w}, 2;
    lop3.b32 a, b, 0x80008000, a, 0xea;
    mul.rn.f16x2 {p3}, a, {s};"""
PLANES_FLOAT16: tl.constexpr = tl.constexpr(planes_of(_FLOAT16, ".reg .b32 a, b;", 1))
E2M1_FLOAT16: tl.constexpr = tl.constexpr(planes_of(_FLOAT16, ".reg .b32 a, b;", 4))


@triton.jit
def planes_float16(w, s, ASM: tl.constexpr):
    """E2M1 elements and their scales, int16 and float16 of one shape, to the four planes times the scale."""
    if ASM:
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            PLANES_FLOAT16,
            "=&r,=&r,=&r,=&r,r,r",
            args=[w, s],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        u = w.to(tl.uint16, bitcast=True)
        p0 = (u & 0x8E00).to(tl.float16, bitcast=True) * s
        p1 = ((u << 3) & 0x8E00).to(tl.float16, bitcast=True) * s
        p2 = (((u << 6) & 0x0E00) | ((u << 1) & 0x8000)).to(tl.float16, bitcast=True) * s
        p3 = (((u << 9) & 0x0E00) | ((u << 2) & 0x8000)).to(tl.float16, bitcast=True) * s
    return p0, p1, p2, p3


@triton.jit
def e4m3_scale_float16(b):
    """Bytes of E4M3 scales, none negative, as float16. Of E4M3's two NaN, 0xFF is NaN in float16 too, and 0x7F is not."""
    # e4m3's exponent and mantissa in float16's place are the value times 2^-8.
    return ((b.to(tl.uint16) << 7).to(tl.float16, bitcast=True) * 256.0).to(tl.float16)
