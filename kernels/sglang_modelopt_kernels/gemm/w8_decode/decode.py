"""Exact conversion of 8-bit codes to fp16 and bf16, four codes to a register.

The assembly converts the four bytes of a register, whichever elements the compiler put there, and returns two values to a
register in their order. It is used where it takes fewer instructions than the compiler's own conversions (``benchmarks.aot``):
from SM89 on there are instructions that convert E4M3, and the compiler's int8 to bf16 is no worse.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _two_words(text: str, registers: str) -> str:
    """Return assembly that converts the four bytes ``{w}`` of a word to two words, with ``prmt`` selectors for both."""
    halves = (("$0", "0x4140", "0x1404", "$3"), ("$1", "0x4342", "0x3424", "$4"))
    parts = [text.format(p=p, w="$2", beside=beside, above=above, s=s) for p, beside, above, s in halves]
    return "{ " + registers + "\n" + "\n".join(parts) + " }"


INT8_FLOAT16: tl.constexpr = tl.constexpr(
    _two_words(
        """lop3.b32 a, {w}, 0x80808080, 0, 0x3c;
        prmt.b32 a, a, m, {beside};
        add.rn.f16x2 {p}, a, z;""",
        ".reg .b32 a, m, z; mov.b32 m, 0x64646464; mov.b32 z, 0xe480e480;",
    )
)
"""With its sign bit flipped int8 is the code + 128: under the exponent of 1024, minus 1152."""
INT8_BFLOAT16: tl.constexpr = tl.constexpr(
    _two_words(
        """prmt.b32 a, {w}, m, {beside};
        lop3.b32 b, a, 0xff80ff80, 0x80008000, 0x6a;
        and.b32 a, a, 0xff7fff7f;
        fma.rn.bf16x2 {p}, a, o, b;""",
        ".reg .b32 a, b, m, o; mov.b32 m, 0x43434343; mov.b32 o, 0x3f803f80;",
    )
)
"""Seven bits under the exponent of 128, minus 128, or 256 for a negative code; ``fma``, as SM80 has no bf16 addition."""
E4M3_FLOAT16: tl.constexpr = tl.constexpr(
    _two_words(
        """prmt.b32 a, {w}, z, {above};
        shr.u32 b, a, 1;
        and.b32 a, a, 0x80008000;
        lop3.b32 b, b, 0x3f803f80, a, 0xea;
        mul.rn.f16x2 {p}, b, m;""",
        ".reg .b32 a, b, m, z; mov.b32 z, 0; mov.b32 m, 0x5c005c00;",
    )
)
"""E4M3's bits in the place of fp16's are the value times 2^-8."""
E4M3_BFLOAT16: tl.constexpr = tl.constexpr(
    _two_words(
        """prmt.b32 a, {w}, z, {above};
        shr.u32 b, a, 4;
        and.b32 a, a, 0x80008000;
        lop3.b32 b, b, 0x07f007f0, a, 0xea;
        fma.rn.bf16x2 {p}, b, {s}, n;""",
        ".reg .b32 a, b, n, z; mov.b32 z, 0; mov.b32 n, 0x80008000;",
    )
)
"""E4M3's bits in the place of bf16's are the value times 2^-120; multiplied by a scale of 2^120 and more, plus -0."""


@triton.jit
def _one(TEXT: tl.constexpr, w):
    """Run assembly of one argument on four bytes, four int16 results."""
    return tl.inline_asm_elementwise(TEXT, "=&r,=&r,r", args=[w], dtype=tl.int16, is_pure=True, pack=4)


@triton.jit
def e4m3_float16(w, NATIVE: tl.constexpr, ASM: tl.constexpr):
    """Convert E4M3, or its bytes where NATIVE is off, to fp16."""
    if NATIVE:
        unit = w.to(tl.float16)
    elif ASM:
        unit = _one(E4M3_FLOAT16, w).to(tl.float16, bitcast=True)
    else:
        u = w.to(tl.uint16)
        unit = ((((u & 0x80) << 8) | ((u & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0).to(tl.float16)
    return unit


@triton.jit
def e4m3_bfloat16(w, b, SCALED: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr):
    """Convert E4M3, or its bytes where NATIVE is off, to bf16, with SCALED times ``2^(b - 127)`` for bytes ``b``.

    The interpreter gets fp32.
    """
    if not ASM:
        u = w.to(tl.uint8, bitcast=True).to(tl.uint16)
        bits = ((u & 0x80) << 8) | ((u & 0x7F) << 4)
        unit = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True) * 2.0**120
        if SCALED:
            unit = unit * (b.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    elif NATIVE:
        unit = w.to(tl.bfloat16)
        if SCALED:
            unit = unit * (b.to(tl.uint16) << 7).to(tl.bfloat16, bitcast=True)
    else:
        if SCALED:
            scale = ((b.to(tl.uint16) + 120) << 7).to(tl.bfloat16, bitcast=True)
        else:
            scale = tl.full(w.shape, 2.0**120, tl.bfloat16)
        bits = tl.inline_asm_elementwise(
            E4M3_BFLOAT16, "=&r,=&r,r,r,r", args=[w, scale], dtype=tl.int16, is_pure=True, pack=4
        )
        unit = bits.to(tl.bfloat16, bitcast=True)
    return unit


@triton.jit
def int8_float16(w, ASM: tl.constexpr):
    """Convert int8 to fp16."""
    if ASM:
        unit = _one(INT8_FLOAT16, w).to(tl.float16, bitcast=True)
    else:
        unit = w.to(tl.float16)
    return unit


@triton.jit
def int8_bfloat16(w, NATIVE: tl.constexpr, ASM: tl.constexpr):
    """Convert int8 to bf16; to fp32 in the interpreter."""
    if not ASM:
        unit = w.to(tl.float32)
    elif NATIVE:
        unit = w.to(tl.bfloat16)
    else:
        unit = _one(INT8_BFLOAT16, w).to(tl.bfloat16, bitcast=True)
    return unit
