"""``python -m benchmarks.soak`` on a CPU, for a minute: every kind of request, flushes and retraction."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.server, pytest.mark.full]


@pytest.mark.timeout(1200)
def test_mixed_requests_leave_the_server_as_it_was(tmp_path: Path) -> None:
    words = ["--requests", "300", "--models", str(tmp_path / "models"), "--log", str(tmp_path / "log")]
    command = [
        sys.executable,
        "-m",
        "benchmarks.soak",
        *words,
        "--json",
        str(tmp_path / "r.json"),
        "--",
        "--dtype",
        "float32",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads((tmp_path / "r.json").read_text())
    assert sum(found["sent"].values()) == 300
    assert found["sent"].keys() == {"answered", "aborted by name", "closed by the client", "too long", "scored"}
    assert (found["error_count"], found["flushes"], found["greedy_equal"]) == (0, 2, True)
    assert found["retracted"] > 0, "long answers that were asked for together"
    assert re.search(r"errors: 0\n", done.stdout)
