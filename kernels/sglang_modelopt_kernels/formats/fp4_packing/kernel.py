"""Decoding planes in registers, for kernels of every kind."""

from __future__ import annotations

import triton
import triton.language as tl


def one_plane(text: str, registers: str) -> str:
    """Assembly of one word of elements, ``$1``, under its scales, ``$2``, to the word of one plane; see :func:`planes_of`."""
    return "{ " + registers + "\n" + text.format(p="$0", w="$1", s="$2") + " }"


def planes_of(texts: tuple[str, str, str, str], registers: str, words: int) -> str:
    """Assembly of ``words`` words of elements ``{w}`` under scales ``{s}`` to a word ``{p}`` of each plane, by the text of each.

    Of a plane the words follow each other: several are a matrix instruction's fragment; each plane is given them again.
    """
    parts = []
    for word in range(words):
        for plane, text in enumerate(texts):
            parts.append(text.format(p=f"${plane * words + word}", w=f"${4 * words + word}", s=f"${8 * words + word}"))
    return "{ " + registers + "\n" + "\n".join(parts) + " }"


_REGISTERS = ".reg .b32 a, b;"
TEXTS_FLOAT16 = (
    """and.b32 a, {w}, 0x8e008e00;
    mul.rn.f16x2 {p}, a, {s};""",
    """shl.b32 a, {w}, 3;
    and.b32 a, a, 0x8e008e00;
    mul.rn.f16x2 {p}, a, {s};""",
    """shl.b32 a, {w}, 6;
    and.b32 a, a, 0x0e000e00;
    shl.b32 b, {w}, 1;
    lop3.b32 a, b, 0x80008000, a, 0xea;
    mul.rn.f16x2 {p}, a, {s};""",
    """shl.b32 a, {w}, 9;
    and.b32 a, a, 0x0e000e00;
    shl.b32 b, {w}, 2;
    lop3.b32 a, b, 0x80008000, a, 0xea;
    mul.rn.f16x2 {p}, a, {s};""",
)
"""E2M1 under its scale to float16 times 2^-14, by plane: a word ``{w}`` of elements under scales ``{s}`` to a word ``{p}``."""
PLANES_FLOAT16: tl.constexpr = tl.constexpr(tuple(one_plane(text, _REGISTERS) for text in TEXTS_FLOAT16))
E2M1_FLOAT16: tl.constexpr = tl.constexpr(planes_of(TEXTS_FLOAT16, _REGISTERS, 4))


@triton.jit
def plane(w, s, SOURCES: tl.constexpr, PLANE: tl.constexpr):
    """Decode one plane of elements and multiply by their scales, in assembly, two to a register, in the type of the scales.

    A plane at a time, because the compiler moves assembly in front of a change of layout only where it has one result: it is then
    codes that go through shared memory, once, and not the four planes.
    """
    return tl.inline_asm_elementwise(SOURCES[PLANE], "=r,r,r", args=[w, s], dtype=s.dtype, is_pure=True, pack=2)


@triton.jit
def planes_float16(w, s, ASM: tl.constexpr):
    """E2M1 elements and their scales, int16 and float16 of one shape, to the four planes times the scale."""
    if ASM:
        p0 = plane(w, s, PLANES_FLOAT16, 0)
        p1 = plane(w, s, PLANES_FLOAT16, 1)
        p2 = plane(w, s, PLANES_FLOAT16, 2)
        p3 = plane(w, s, PLANES_FLOAT16, 3)
    else:
        u = w.to(tl.uint16, bitcast=True)
        p0 = (u & 0x8E00).to(tl.float16, bitcast=True) * s
        p1 = ((u << 3) & 0x8E00).to(tl.float16, bitcast=True) * s
        p2 = (((u << 6) & 0x0E00) | ((u << 1) & 0x8000)).to(tl.float16, bitcast=True) * s
        p3 = (((u << 9) & 0x0E00) | ((u << 2) & 0x8000)).to(tl.float16, bitcast=True) * s
    return p0, p1, p2, p3


@triton.jit
def e4m3_scale_float16(b):
    """Decode bytes of E4M3 scales, none negative, to float16. Of E4M3's two NaN, 0xFF is NaN in float16 too, and 0x7F is not."""
    # e4m3's exponent and mantissa in float16's place are the value times 2^-8.
    return ((b.to(tl.uint16) << 7).to(tl.float16, bitcast=True) * 256.0).to(tl.float16)
