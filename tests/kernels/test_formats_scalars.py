"""The element and scale types alone: every code, every tie, every byte, against arithmetic written out here."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_modelopt_kernels.formats import e2m1, e4m3, ue8m0

FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def e2m1_value(code: int) -> float:
    """The value of a code from its fields: bias 1, subnormals of 0.5."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = 0.5 * mantissa if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return math.copysign(magnitude, -1 if code & 8 else 1)


def e4m3_value(byte: int) -> float:
    """The value of a byte from its fields: bias 7, subnormals of 2^-9, NaN at all ones."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return math.copysign(magnitude, -1 if byte & 0x80 else 1)


def nearest(x: float, magnitudes: list[float], ties: str) -> int:
    """The index of the magnitude nearest to ``|x|``, in exact arithmetic."""
    target = abs(Fraction(x))
    above = bisect_left(magnitudes, target)
    if above in (0, len(magnitudes)):
        return min(above, len(magnitudes) - 1)
    to_below, to_above = target - Fraction(magnitudes[above - 1]), Fraction(magnitudes[above]) - target
    if to_below != to_above:
        return above - 1 if to_below < to_above else above
    return above - 1 if ties == "down" or above % 2 else above


E2M1_MAGNITUDES = [e2m1_value(code) for code in range(8)]
E4M3_MAGNITUDES = [e4m3_value(byte) for byte in range(0x7F)]


def same_float(a: float, b: float) -> bool:
    """Equal, with NaN equal to itself and the two zeros apart."""
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


class TestE2M1:
    def test_decode_every_code(self) -> None:
        values = e2m1.decode(torch.arange(16, dtype=torch.uint8)).tolist()
        assert all(same_float(v, e2m1_value(c)) for c, v in enumerate(values))
        assert list(map(abs, values)) == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0] * 2

    def test_every_byte_unpacks_low_nibble_first_and_packs_back(self) -> None:
        packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
        codes = e2m1.unpack_codes(packed)
        assert codes.shape == (4, 128)
        assert codes.dtype == torch.uint8
        flat = codes.reshape(-1, 2).tolist()
        assert flat == [[byte % 16, byte // 16] for byte in range(256)]
        assert torch.equal(e2m1.pack_codes(codes), packed)

    def test_pack_rejects_an_odd_row(self) -> None:
        with pytest.raises(ValueError, match="odd"):
            e2m1.pack_codes(torch.zeros(2, 3, dtype=torch.uint8))

    @pytest.mark.parametrize("ties", ["even", "down"])
    def test_encode_is_the_inverse_of_decode(self, ties: e2m1.Ties) -> None:
        codes = torch.tensor([c for c in range(16) if c not in (0, 8)], dtype=torch.uint8)
        assert torch.equal(e2m1.encode(e2m1.decode(codes), ties), codes)

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize(
        ("midpoint", "even", "down"),
        [(0.25, 0, 0), (0.75, 2, 1), (1.25, 2, 2), (1.75, 4, 3), (2.5, 4, 4), (3.5, 6, 5), (5.0, 6, 6)],
    )
    def test_ties(self, midpoint: float, even: int, down: int, sign: int) -> None:
        below, above = math.nextafter(midpoint, 0), math.nextafter(midpoint, 9)
        # As float32: the neighbours of the midpoint, one step of float32 away.
        x = torch.tensor([midpoint, below, above]) * sign
        x = torch.stack((x[0], torch.nextafter(x[0], x[0] * 0), torch.nextafter(x[0], x[0] * 9)))
        bit = 8 if sign < 0 else 0
        low = nearest(below, E2M1_MAGNITUDES, "down")
        assert e2m1.encode(x, "even").tolist() == [even | bit, low | bit, (low + 1) | bit]
        assert e2m1.encode(x, "down").tolist() == [down | bit, low | bit, (low + 1) | bit]

    @pytest.mark.parametrize(
        ("x", "even", "down"),
        [
            (0.0, 0, 8),  # MXFP4QTensor.cast_fp4 gives every zero a sign bit
            (-0.0, 0, 8),
            (1e-30, 0, 0),
            (-1e-30, 8, 8),
            (6.1, 7, 7),
            (-1e30, 15, 15),
            (math.inf, 7, 7),
            (-math.inf, 15, 15),
        ],
    )
    def test_zeros_and_saturation(self, x: float, even: int, down: int) -> None:
        assert e2m1.encode(torch.tensor([x]), "even").item() == even
        assert e2m1.encode(torch.tensor([x]), "down").item() == down

    @given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=64), st.sampled_from(["even", "down"]))
    def test_encode_is_nearest(self, xs: list[float], ties: e2m1.Ties) -> None:
        codes = e2m1.encode(torch.tensor(xs), ties).tolist()
        assert [code & 7 for code in codes] == [nearest(x, E2M1_MAGNITUDES, ties) for x in xs]


class TestE4M3:
    def test_decode_every_byte(self) -> None:
        raw = torch.arange(256, dtype=torch.uint8)
        for codes in (raw, raw.view(torch.float8_e4m3fn)):
            assert all(same_float(v, e4m3_value(b)) for b, v in enumerate(e4m3.decode(codes).tolist()))
            assert e4m3.byte_is_nan(codes).tolist() == [math.isnan(e4m3_value(b)) for b in range(256)]
            assert e4m3.byte_is_negative(codes).tolist() == [e4m3_value(b) < 0 for b in range(256)]

    def test_every_value_and_every_tie(self) -> None:
        middles = [(a + b) / 2 for a, b in pairwise(E4M3_MAGNITUDES)]
        xs = torch.tensor(E4M3_MAGNITUDES + middles)
        for x in (xs, -xs, torch.nextafter(xs, torch.tensor(0.0)), torch.nextafter(xs, torch.tensor(1e9))):
            want = [math.copysign(E4M3_MAGNITUDES[nearest(v, E4M3_MAGNITUDES, "even")], v) for v in x.tolist()]
            assert e4m3.round_to_e4m3(x).tolist() == want

    @pytest.mark.parametrize(
        ("x", "want"),
        [(464.0, 448.0), (465.0, 448.0), (-1e30, -448.0), (math.inf, 448.0), (-math.inf, -448.0), (2.0**-10, 0.0)],
    )
    def test_saturation(self, x: float, want: float) -> None:
        assert e4m3.round_to_e4m3(torch.tensor(x)).item() == want

    def test_nan_stays_nan(self) -> None:
        assert e4m3.round_to_e4m3(torch.tensor([math.nan, 1.0])).isnan().tolist() == [True, False]

    @given(st.lists(FLOAT32, min_size=1, max_size=64))
    def test_round_is_nearest(self, xs: list[float]) -> None:
        values = e4m3.round_to_e4m3(torch.tensor(xs)).tolist()
        want = [math.copysign(E4M3_MAGNITUDES[nearest(x, E4M3_MAGNITUDES, "even")], x) for x in xs]
        assert all(map(same_float, values, want))


class TestUE8M0:
    def test_decode_every_byte(self) -> None:
        values = ue8m0.decode(torch.arange(256, dtype=torch.uint8)).tolist()
        assert values[:255] == [math.ldexp(1.0, byte - 127) for byte in range(255)]
        assert math.isnan(values[255])

    def test_encode_every_exponent_and_clamp(self) -> None:
        exponents = torch.arange(-127, 128)
        assert ue8m0.encode(exponents).tolist() == list(range(255))
        assert ue8m0.encode(exponents.float()).tolist() == list(range(255))
        assert ue8m0.encode(torch.tensor([-math.inf, -200.0, 128.0])).tolist() == [0, 0, 254]

    def test_only_255_is_nan(self) -> None:
        assert ue8m0.byte_is_nan(torch.arange(256, dtype=torch.uint8)).nonzero().tolist() == [[255]]

    @pytest.mark.parametrize("scale", [ue8m0.weight_scale, ue8m0.activation_scale])
    @pytest.mark.parametrize("element_max", [6.0, 448.0])
    @given(st.lists(st.floats(0, width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=32))
    def test_scale_is_the_smallest_that_does_not_clip(
        self, scale: Callable[[torch.Tensor, float], torch.Tensor], element_max: float, amaxes: list[float]
    ) -> None:
        # As bf16, whose quotients keep clear of the powers of two that float32 logarithms confuse.
        amax = torch.tensor(amaxes).bfloat16().float()
        amax = amax[torch.isfinite(amax)]
        for a, byte in zip(amax.tolist(), scale(amax, element_max).tolist(), strict=True):
            ratio = Fraction(a) / Fraction(element_max)
            assert ratio <= Fraction(2) ** (byte - 127) or byte == 254
            assert byte == 0 or ratio > Fraction(2) ** (byte - 128)

    def test_exact_powers_of_two_and_their_neighbours(self) -> None:
        powers = torch.tensor([math.ldexp(1.0, e) for e in range(-126, 125)])
        assert ue8m0.activation_scale(6 * powers, 6.0).tolist() == [e + 127 for e in range(-126, 125)]
        assert ue8m0.weight_scale(6 * powers, 6.0).tolist() == [e + 127 for e in range(-126, 125)]
        above = powers * (1 + 2.0**-23)
        assert ue8m0.activation_scale(above, 1.0).tolist() == [e + 128 for e in range(-126, 125)]

    def test_zero_and_non_finite_blocks(self) -> None:
        amax = torch.tensor([0.0, math.inf, math.nan])
        assert ue8m0.activation_scale(amax, 6.0).tolist() == [0, 255, 255]
        # The least subnormal numbers divided by 6 round to zero, and have the least scale as well.
        assert ue8m0.activation_scale(torch.tensor([2.0**-149, 2.0**-147]), 6.0).tolist() == [0, 0]
        assert ue8m0.weight_scale(amax[:1], 6.0).tolist() == [0]
