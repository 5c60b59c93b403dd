"""``benchmarks.soak``: what counts as flat memory and as a passed run."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from benchmarks.soak import Outcome


def outcome(sizes: list[float], **fields: object) -> Outcome:
    """Return a run of 100 requests between samples of memory, with no error and equal answers."""
    memory = [(100 * index, size) for index, size in enumerate(sizes)]
    return Outcome(sent=Counter(answered=100 * (len(sizes) - 1)), memory=memory, greedy_equal=True, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "flat"),
    [
        ([500.0] * 40, True),
        ([400.0] * 8 + [500.0, 520.0] * 16, True),  # what is allocated at the beginning is no leak
        ([500.0 + 2 * index for index in range(40)], False),
        ([500.0 + index / 2 for index in range(40)], True),  # 2 %
        ([500.0], True),
    ],
)
def test_flat_memory(sizes: list[float], flat: bool) -> None:
    found = outcome(sizes)
    assert found.is_flat() == flat
    assert found.passed() == flat
    assert ("GROWS" in found.text()) != flat


def test_growth_is_the_slope_for_a_thousand_requests() -> None:
    assert outcome([500.0 + 2 * index for index in range(40)]).growth() == pytest.approx(20.0)


def test_a_run_can_be_written_as_json() -> None:
    assert json.loads(json.dumps(vars(outcome([500.0, 500.0]))))["sent"] == {"answered": 100}


def test_an_error_and_other_answers_fail() -> None:
    assert outcome([500.0] * 9).passed()
    assert not outcome([500.0] * 9, error_count=1).passed()
    different = outcome([500.0] * 9)
    different.greedy_equal = False
    assert not different.passed()
    assert "DIFFERENT" in different.text()
