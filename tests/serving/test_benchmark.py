"""``python -m benchmarks.serving`` on a CPU: two real servers under its load."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.exports import export
from tests.support.models import TinyModel, model_dir

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.server, pytest.mark.full]


@pytest.mark.timeout(900)
def test_the_table(tmp_path: Path) -> None:
    source = model_dir(TinyModel("llama"))
    quantized = export(source, "W4A8_NVFP4_FP8_CFG")
    text = tmp_path / "text.txt"
    text.write_text("A model reads one word after the other, and guesses the next. " * 60, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "benchmarks.serving",
        "--model",
        str(source),
        "--model",
        f"{quantized}=modelopt_w4a8",
    ]
    command += ["--text", str(text), "--windows", "2", "--window-tokens", "32", "--requests", "4", "--concurrency", "2"]
    command += ["--input-tokens", "16", "--output-tokens", "8", "--log", str(tmp_path / "log.txt")]
    command += ["--", "--dtype", "float32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    reference, ours = done.stdout.splitlines()[-2:]
    assert reference.endswith(" -")
    assert ours.startswith("W4A8_NVFP4_FP8 modelopt_w4a8")
    figures = [float(word) for word in re.findall(r"\s(\d+\.\d+)", ours)]
    assert len(figures) == 4
    assert all(figure > 0 for figure in figures)


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.serving", "--model", str(tmp_path / "nothing"), "--text", __file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
