"""The speeds that ``serve`` prints are those of the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sglang_modelopt_ext.workflow.common.served_speed import LOADS, MEASURED, advice

CHOOSING = Path(__file__).resolve().parents[2] / "docs" / "choosing.md"


def documented() -> dict[str, list[str]]:
    """Return the cells of the table of served speeds, by recipe; the headings under an empty name."""
    section = CHOOSING.read_text(encoding="utf-8").partition("### Measured in a server")[2]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    end = next(index for index, row in enumerate(rows) if row[0].startswith("KV cache"))
    return {"": rows[0][1:]} | {row[0].split(",")[0]: row[1:] for row in reversed(rows[2:end])}


def test_the_figures_are_those_of_the_documentation() -> None:
    table, (run,) = documented(), MEASURED
    assert table[""][: len(LOADS)] == list(LOADS)
    for recipe, speeds in run.speeds.items():
        found = [float(re.match(r"[\d.]+", cell)[0]) for cell in table[recipe][: len(LOADS)]]  # type: ignore[index]
        # The documentation has times of first tokens, here are speeds.
        expected = [1 / value if "of" in load else value for load, value in speeds.items()]
        assert found == pytest.approx(expected), recipe
    text = CHOOSING.read_text(encoding="utf-8")
    assert run.gpu in text
    assert run.date in text


def test_advice() -> None:
    line = advice(90)
    assert "decoding 1 request W4A8_MXFP4_FP8 (1.34 of FP8's speed)" in line
    assert "the first token of 8192 FP8;" in line
    assert "no recipe was measured in a server on SM89" in advice(89)
