"""The inline PTX of the block-scaled kernel, read from its source and emulated: every code word under every scale.

Triton's interpreter cannot run inline assembly, so that its runs use the twin in Triton's language. Here the assembly itself is
held to what the packing says, without a GPU.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sglang_modelopt_kernels.formats import e2m1
from sglang_modelopt_kernels.formats.fp4_packing.kernel import E2M1_FLOAT16, PLANES_FLOAT16
from sglang_modelopt_kernels.formats.fp4_packing.naive import naive_planes
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell.kernel import widen
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import fold
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper.kernel import FOLD, FOLD_FRAGMENT
from sglang_modelopt_kernels.gemm.w4_decode.kernel import (
    E2M1_BFLOAT16,
    INT4_BFLOAT16,
    INT4_FLOAT16,
    PLANES_BFLOAT16,
)
from sglang_modelopt_kernels.gemm.w4_decode.packing import EXPONENT_BOTTOM, EXPONENT_TOP
from sglang_modelopt_kernels.gemm.w4_stream.kernel import NVFP4_FRAGMENT, NVFP4_FRAGMENT_32
from sglang_modelopt_kernels.gemm.w8_decode.decode import E4M3_BFLOAT16, E4M3_FLOAT16, INT8_BFLOAT16, INT8_FLOAT16
from sglang_modelopt_kernels.gemm.w8_decode.packing import SPAN

Words = NDArray[np.uint32]
Halves = NDArray[np.uint16]


def as_float16(halves: Halves) -> NDArray[np.float64]:
    return halves.view(np.float16).astype(np.float64)


def to_float16(values: NDArray[np.float64]) -> Halves:
    return values.astype(np.float16).view(np.uint16)


def as_bfloat16(halves: Halves) -> NDArray[np.float64]:
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def to_bfloat16(values: NDArray[np.float64]) -> Halves:
    # Exact values only: what does not fit fails the comparison.
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def both_halves(
    operation: Callable[..., NDArray[np.float64]],
    read: Callable[[Halves], NDArray[np.float64]],
    write: Callable[..., Halves],
) -> Callable[..., Words]:
    """An instruction on two numbers in a word."""

    def run(*words: Words) -> Words:
        low = write(operation(*(read((word & 0xFFFF).astype(np.uint16)) for word in words)))
        high = write(operation(*(read((word >> 16).astype(np.uint16)) for word in words)))
        return low.astype(np.uint32) | high.astype(np.uint32) << 16

    return run


def lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    """Any function of three bits, by its truth table (PTX ISA, lop3)."""
    result = np.zeros_like(a | b | c)
    for row in range(8):
        if (int(table) >> row) & 1:
            terms = [word if row >> shift & 1 else ~word for word, shift in ((a, 2), (b, 1), (c, 0))]
            result |= terms[0] & terms[1] & terms[2]
    return result


def prmt(a: Words, b: Words, selector: Words) -> Words:
    """Four of the eight bytes of ``b`` and ``a``, by the nibbles of the selector, none of which asks for signs (PTX ISA, prmt)."""
    result = np.zeros_like(a | b | selector)
    for place in range(4):
        index = selector >> np.uint32(4 * place) & np.uint32(15)
        assert bool((index < 8).all())
        word = np.where(index < 4, a, b)
        result |= (word >> (np.uint32(8) * (index & np.uint32(3))) & np.uint32(255)) << np.uint32(8 * place)
    return result


INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": lop3,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": prmt,
    "add.rn.f16x2": both_halves(lambda a, b: a + b, as_float16, to_float16),
    "mul.rn.f16x2": both_halves(lambda a, b: a * b, as_float16, to_float16),
    "fma.rn.bf16x2": both_halves(lambda a, b, c: a * b + c, as_bfloat16, to_bfloat16),
}


def emulate(source: str, *inputs: Words, outputs: int = 4) -> list[Words]:
    """Runs the one ``inline_asm_elementwise`` of a function, or the assembly itself. Raises KeyError for an unknown instruction."""
    found = re.search(r'(?:inline_asm_elementwise\(\s*"""|^)\{(.*?)\}', source, re.S)
    assert found is not None
    registers: dict[str, Words] = {f"${outputs + index}": word for index, word in enumerate(inputs)}

    def read(operand: str) -> Words:
        return np.uint32(int(operand, 0)) if operand[0].isdigit() else registers[operand]  # type: ignore[return-value]

    for line in filter(None, (line.strip() for line in found[1].split(";"))):
        name, _, operands = line.partition(" ")
        if name == ".reg":
            continue
        target, *arguments = (operand.strip() for operand in operands.split(","))
        registers[target] = INSTRUCTIONS[name](*(read(argument) for argument in arguments))
    return [registers[f"${plane}"] for plane in range(outputs)]


def expected_planes(words: Halves) -> list[NDArray[np.float64]]:
    """Decode packed elements by the naive twin: their values, plane by plane."""
    return [plane.numpy() for plane in naive_planes(torch.from_numpy(words.view(np.int16))).unbind(-1)]


E4M3_SCALES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
EXPONENT_SCALES = np.exp2(np.arange(EXPONENT_BOTTOM, EXPONENT_TOP + 1) - 15.0)
CASES = {
    # assembly of each plane, writer and reader of its type, scales as they reach it, what it divides the weight by
    "float16 e4m3": (PLANES_FLOAT16, to_float16, as_float16, E4M3_SCALES, 2.0**-14),
    "float16 exponent": (PLANES_FLOAT16, to_float16, as_float16, EXPONENT_SCALES, 2.0**-14),
    "bf16 e4m3": (PLANES_BFLOAT16, to_bfloat16, as_bfloat16, E4M3_SCALES * 2.0**117, 2.0**-126),
    "bf16 exponent": (PLANES_BFLOAT16, to_bfloat16, as_bfloat16, EXPONENT_SCALES * 2.0**112, 2.0**-126),
}


@pytest.mark.parametrize("case", CASES)
def test_every_word_under_every_scale(case: str) -> None:
    """Two elements share a register: all 65536 in the low half, beside as many others under another scale in the high half."""
    sources, write, read, scales, unit = CASES[case]
    low = np.arange(1 << 16, dtype=np.uint16)
    high = low * np.uint16(40503) + np.uint16(1)
    words = low.astype(np.uint32) | high.astype(np.uint32) << 16
    right_low, right_high = expected_planes(low), expected_planes(high)
    for index, scale in enumerate(scales):
        other = scales[-1 - index]
        pair = np.uint32(write(np.array([scale]))[0]) | np.uint32(write(np.array([other]))[0]) << np.uint32(16)
        for plane, source in enumerate(sources.value):
            word = emulate(source, words, np.full_like(words, pair), outputs=1)[0]
            got_low, got_high = read((word & 0xFFFF).astype(np.uint16)), read((word >> 16).astype(np.uint16))
            assert np.array_equal(got_low, right_low[plane] * unit * scale), (plane, scale)
            assert np.array_equal(got_high, right_high[plane] * unit * other), (plane, other)


def four_words() -> list[Words]:
    """Every 16 bits in the low and in the high half of a word, four times in other pairs."""
    every = np.arange(1 << 16, dtype=np.uint32)
    return [every | (every * np.uint32(40503 + 2 * j) + np.uint32(j)) << np.uint32(16) for j in range(4)]


FRAGMENTS = {
    "float16": (E2M1_FLOAT16, to_float16, as_float16, E4M3_SCALES[[0, 1, 60, 126]], 2.0**-14),
    "bf16": (E2M1_BFLOAT16, to_bfloat16, as_bfloat16, E4M3_SCALES[[0, 1, 60, 126]] * 2.0**117, 2.0**-126),
}


@pytest.mark.parametrize("case", FRAGMENTS)
def test_every_word_of_a_fragment(case: str) -> None:
    """Four words under four scales, one result for each plane and word: those of a plane follow each other."""
    text, write, read, scales, unit = FRAGMENTS[case]
    words = four_words()
    pairs = [np.full_like(words[0], int(write(np.array([scale]))[0]) * 0x10001) for scale in scales]
    results = emulate(text.value, *words, *words * 3, *pairs, *pairs * 3, outputs=16)
    for plane, j in itertools.product(range(4), range(4)):
        for shift in (0, 16):
            half = (words[j] >> np.uint32(shift) & np.uint32(0xFFFF)).astype(np.uint16)
            got = read((results[4 * plane + j] >> np.uint32(shift) & np.uint32(0xFFFF)).astype(np.uint16))
            assert np.array_equal(got, expected_planes(half)[plane] * unit * scales[j]), (plane, j)


@pytest.mark.parametrize(("text", "read"), [(INT4_FLOAT16, as_float16), (INT4_BFLOAT16, as_bfloat16)])
def test_every_integer_of_a_fragment(text: Any, read: Callable[[Halves], NDArray[np.float64]]) -> None:
    """INT4: nibbles of a word in the order of planes, less 8."""
    words = four_words()
    results = emulate(text.value, *words, *words * 3, outputs=16)
    for plane, j in itertools.product(range(4), range(4)):
        for shift in (0, 16):
            integers = (words[j] >> np.uint32(shift + 4 * plane) & np.uint32(15)).astype(np.float64) - 8
            got = read((results[4 * plane + j] >> np.uint32(shift) & np.uint32(0xFFFF)).astype(np.uint16))
            assert np.array_equal(got, integers), (plane, j)


BYTES = {
    "int8 float16": (INT8_FLOAT16, as_float16, torch.int8),
    "int8 bf16": (INT8_BFLOAT16, as_bfloat16, torch.int8),
    "e4m3 float16": (E4M3_FLOAT16, as_float16, torch.float8_e4m3fn),
    "e4m3 bf16": (E4M3_BFLOAT16, as_bfloat16, torch.float8_e4m3fn),
}


@pytest.mark.parametrize("case", BYTES)
def test_every_byte_of_8_bit_weights(case: str) -> None:
    """Every code in each place of a word, beside others: two numbers to a word, in order, E4M3 in bf16 under every exponent."""
    text, read, dtype = BYTES[case]
    first = torch.arange(256, dtype=torch.uint8)
    places = [first, first.flip(0), first ^ 90, first.roll(17)]
    if dtype == torch.float8_e4m3fn:  # NaN is no legal code
        places = [torch.where((place & 0x7F) == 0x7F, 0, place) for place in places]
    words = sum(place.numpy().astype(np.uint32) << np.uint32(8 * i) for i, place in enumerate(places))
    exponents = range(-SPAN, 1) if case == "e4m3 bf16" else (0,)
    for exponent in exponents:
        scales = []
        if case == "e4m3 bf16":
            scales = [np.full_like(words, int(to_bfloat16(np.array([2.0 ** (120 + exponent)]))[0]) * 0x10001)] * 2
        got = emulate(text.value, words, *scales, outputs=2)
        for i, place in enumerate(places):
            half = (got[i // 2] >> np.uint32(16 * (i % 2)) & np.uint32(0xFFFF)).astype(np.uint16)
            right = place.view(dtype).double().numpy() * 2.0**exponent
            assert np.array_equal(read(half), right), (i, exponent)
            if dtype != torch.int8:
                assert np.array_equal(np.signbit(read(half)), np.signbit(right))


def test_a_folded_fragment_is_two_rows() -> None:
    """Two words under two exponents: the first halves of both, then the second ones."""
    first, second = four_words()[:2]
    low, high = np.full_like(first, 0x05050505), np.full_like(first, 0x0C0C0C0C)
    got = emulate(FOLD_FRAGMENT.value, first, second, first, second, low, high, low, high)
    one, two = emulate(FOLD.value, first, low, outputs=2), emulate(FOLD.value, second, high, outputs=2)
    assert all(np.array_equal(a, b) for a, b in zip(got, (one[0], two[0], one[1], two[1]), strict=True))


@pytest.mark.parametrize("block", [16, 32])
def test_a_fragment_of_nvfp4_is_two_rows(block: int) -> None:
    """Two words under every scale: of each plane both rows, the second two planes under the second scale of blocks of 16."""
    first, second = four_words()[:2]
    text = (NVFP4_FRAGMENT if block == 16 else NVFP4_FRAGMENT_32).value
    halves = [expected_halves(word) for word in (first, second)]
    for byte in range(127):  # 127 is NaN, and no scale is negative
        scales = [
            byte,
            126 - byte,
            (byte + 50) % 127,
            (byte + 90) % 127,
        ]  # of two rows, and again of the second 16 elements
        words = [np.full_like(first, scales[i] * 0x101 | scales[i + 1] * 0x1010000) for i in (0, 2)]
        # Each half of a plane has registers of its own, and those of the first are read.
        got = emulate(
            text, *[first, second] * 4, words[0], words[0] * 0, words[1 if block == 16 else 0], words[0] * 0, outputs=8
        )
        for row, plane in itertools.product(range(2), range(4)):
            scale = scales[row + (2 if plane >= 2 and block == 16 else 0)]
            value = float(torch.tensor([scale], dtype=torch.uint8).view(torch.float8_e4m3fn).double())
            for half in range(2):
                bits = (got[row + 2 * plane] >> np.uint32(16 * half) & np.uint32(0xFFFF)).astype(np.uint16)
                right = halves[row][half][plane] * value * 2.0**-14
                assert np.array_equal(as_float16(bits), right), (byte, row, plane, half)
                assert np.array_equal(np.signbit(as_float16(bits)), np.signbit(right))


def expected_halves(word: Words) -> list[NDArray[np.float64]]:
    return [expected_planes((word >> np.uint32(shift) & np.uint32(0xFFFF)).astype(np.uint16)) for shift in (0, 16)]


def test_every_byte_widened() -> None:
    """MXFP4's kernel for SM120: a register holds four bytes of two codes, each a code times 2^-6 in E4M3."""
    first = np.arange(256, dtype=np.uint32)
    words = first | first[::-1] << np.uint32(8) | (first ^ np.uint32(90)) << np.uint32(16) | first << np.uint32(24)
    low, high = emulate(widen.src, words, outputs=2)
    for shift in (0, 8, 16, 24):
        codes = torch.from_numpy((words >> np.uint32(shift) & np.uint32(255)).astype(np.uint8))
        for half, of_byte in ((low, codes & 15), (high, codes >> 4)):
            byte = torch.from_numpy((half >> np.uint32(shift) & np.uint32(255)).astype(np.uint8))
            values = byte.view(torch.float8_e4m3fn).float()
            right = e2m1.decode(of_byte) * 2.0**-6
            assert torch.equal(values, right)
            assert torch.equal(values.signbit(), right.signbit())


@pytest.mark.parametrize("exponent", range(1, 13))
def test_every_word_folded(exponent: int) -> None:
    """MXFP4 made E4M3: every pair of codes in every place of a word, as the packing lays them, under every exponent."""
    pairs = torch.arange(256, dtype=torch.uint8)
    stored = torch.stack([pairs.roll(37 * place) for place in range(16)], dim=1)
    weight = fold(stored, torch.full((256, 1), 100, dtype=torch.uint8))
    words = weight.codes.numpy().view(np.uint32)
    low, high = emulate(FOLD.value, words, np.full_like(words, exponent * 0x01010101), outputs=2)
    got = np.concatenate([half.view(np.uint8) for half in (low, high)], axis=1)
    values = torch.from_numpy(got).view(torch.float8_e4m3fn).double()
    codes = e2m1.decode(e2m1.unpack_codes(stored)).double()
    assert torch.equal(values, codes * 2.0 ** (exponent - 6))
    assert torch.equal(values.signbit(), codes.signbit())


def test_a_wrong_mask_is_found() -> None:
    source = PLANES_FLOAT16.value[2].replace("0x0e000e00", "0x06000e00", 1)
    words = np.arange(1 << 16, dtype=np.uint32)
    plane = emulate(source, words, np.full_like(words, 0x3C003C00), outputs=1)[0]
    expected = expected_planes(words.astype(np.uint16))[2] * 2.0**-14
    # The mask of the high half is wrong there; fill that half with the same words.
    both = emulate(source, words | words << 16, np.full_like(words, 0x3C003C00), outputs=1)[0]
    assert np.array_equal(as_float16((plane & 0xFFFF).astype(np.uint16)), expected)
    assert not np.array_equal(as_float16((both >> 16).astype(np.uint16)), expected)
