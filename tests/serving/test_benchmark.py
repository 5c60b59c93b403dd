"""``sglang-modelopt bench`` on a CPU: a real server under its load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.server, pytest.mark.full]
LOAD = ["--first-token", "64", "--concurrency", "1", "2", "--prompt", "16", "--output", "8"]
LOAD += ["--long", "2x512", "--long-output", "8", "--repeats", "1"]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with its files in ``folder``, from there: nothing of the repository but the package is needed."""
    command = [sys.executable, "-m", "sglang_modelopt_ext.cli", "bench", *arguments, "--shape", "tiny", "--json"]
    command += ["--models", str(folder / "models"), "--logs", str(folder / "logs"), "--results", str(folder / "r.json")]
    command += ["--report", str(folder / "r.md"), *LOAD, "--", "--dtype", "float32"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.timeout(900)
def test_a_server_is_measured(tmp_path: Path) -> None:
    done = run(tmp_path, "nvfp4+kv-nvfp4", "--budget", "600")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert json.loads(done.stdout)["results"] == [result]
    rates = ["decode, 1 x 16 (tok/s)", "decode, 2 x 16 (tok/s)", "prefill, 2 x 512 (tok/s)", "decode, 2 x 512 (tok/s)"]
    memory = ["weights (GiB)", "KV cache (GiB)", "KV cache (tokens)"]
    assert list(result["figures"]) == ["start (s)", *memory, "TTFT, 64 tokens (ms)", *rates]
    assert all(
        result["figures"][name] > 0 for name in ["start (s)", "KV cache (tokens)", "TTFT, 64 tokens (ms)", *rates]
    )
    assert any("8 linear layers W4A8_NVFP4_FP8" in line for line in result["served"])
    page = (tmp_path / "r.md").read_text()
    assert all(name in page for name in rates)
    assert "--kv-cache-dtype modelopt_nvfp4" in page
