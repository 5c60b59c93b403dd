"""The search for tiles, but for what needs a GPU."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import tiles
from benchmarks.workers import Workers
from sglang_modelopt_kernels.gemm.common import KernelConfig

SHARED = 227 << 10


@pytest.mark.parametrize("name", tiles.KERNELS)
@pytest.mark.parametrize("m", [1, 16, 64, 256, 5000])
def test_the_grid_holds_what_a_device_could(name: str, m: int) -> None:
    configs = list(tiles.grid(tiles.KERNELS[name], m, 4096, 4096, SHARED))
    assert len(configs) == len(set(configs)) > 5
    assert all(config.bm <= max(16, 2 * m) and config.bk in tiles.KERNELS[name].bks for config in configs)
    assert not list(tiles.grid(tiles.KERNELS[name], m, 4096, 4096, 1024))


def test_splits_have_steps() -> None:
    config = KernelConfig(64, 16, 128, 4, 3)
    assert tiles.splits_around(config, 2, 4096) == [1, 4, 8]
    assert tiles.splits_around(config, 1, 256) == []


def test_equal_machine_code_is_compiled_once() -> None:
    """Of two jobs that compile to the same, one runs; what is known is not asked again."""
    asked: list[tiles.Job] = []

    class Recorder:
        def map(self, jobs: list[tiles.Job], deadline: float) -> dict[tiles.Job, str]:
            asked.extend(jobs)
            return dict.fromkeys(jobs, "spills")

    plan = (KernelConfig(64, 16, 128, 4, 3), 1)
    jobs = [tiles.Job("folded", plan, m, 4096) for m in (16, 32, 17)]
    verdicts = tiles.Verdicts(Recorder())  # type: ignore[arg-type]
    verdicts.ask(jobs, 0.0)
    verdicts.ask(jobs, 0.0)
    assert asked == [jobs[0], jobs[2]]
    assert [verdicts.of(job) for job in jobs] == ["spills"] * 3
    case = tiles.Case("folded", 4096, 4096, 16, [plan, (plan[0], 2)])
    assert tiles.count([case], verdicts) == "1 spills, 1 no time"


def test_the_report_orders_by_time() -> None:
    plans = [(KernelConfig(64, 16, 128, 4, stages), 1) for stages in range(2, 10)]
    case = tiles.Case("folded", 4096, 4096, 16, plans)
    lines = tiles.report(
        case, {plan: 20.0 - at for at, plan in enumerate(plans)}, 21.0, (10.0, 40.0), 10**6
    ).splitlines()
    assert len(lines) == 1 + 2 + tiles.SHOWN
    assert [part in lines[2] for part in ("chosen", "2.00 /fp8", "0.50 /bf16")] == [True] * 3
    assert [str(plan[0]) in line for plan, line in zip(reversed(plans), lines[3:], strict=False)] == [True] * 5


def test_a_worker_that_dies_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading address 0 ends the process, another one answers after it; what comes too late is not begun."""
    # As `python -m benchmarks.tiles` finds it: processes started anew get this one's path.
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    workers = Workers(ctypes.string_at, 1, "dead")
    assert workers.map([b"a", 0, b"b"], time.monotonic() + 60) == {b"a": b"a", 0: "dead", b"b": b"b"}
    assert workers.map([b"c"], time.monotonic() - 1) == {b"c": None}
    workers.close()


def test_the_whole_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kernel, shape and number of tokens is reported, where configurations of every other stage are wrong."""

    class Checked:
        def __init__(self, *_: object) -> None:
            pass

        def map(self, jobs: list[tiles.Job], deadline: float) -> dict[tiles.Job, str]:
            return {job: "wrong" if job.plan[0].stages == 3 else "" for job in jobs}

        def close(self) -> None:
            pass

    class Timed:
        stored = 10**7

        def __init__(self, *_: object) -> None:
            pass

        def activations(self, m: int, k: int) -> None:
            pass

        def served(self, x: None) -> float:
            return 10.0

        def time(self, x: None, plan: tiles.Plan, *how: int) -> float:
            return float(plan[0].bn + plan[0].bm + plan[1])

    properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=SHARED)
    monkeypatch.setattr("sys.argv", ["tiles", "--kernel", *tiles.KERNELS, "--tokens", "16,256"])
    monkeypatch.setattr(tiles, "Workers", Checked)
    monkeypatch.setattr(tiles, "Bench", Timed)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(tiles, "capability", lambda: 90)
    monkeypatch.setattr(tiles.gemm, "time_fp8", lambda n, k, tokens: [20.0] * len(tokens))
    monkeypatch.setattr(tiles.gemm, "time_bf16", lambda n, k, tokens: [30.0] * len(tokens))
    tiles.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("bf16 30.0 us") for line in lines) == 4 * len(tiles.KERNELS)
    assert sum(line.startswith("  served") for line in lines) == 4 * len(tiles.KERNELS)
    best = [line for line in lines if line.startswith("  1 ")]
    assert len(best) == 4 * len(tiles.KERNELS)
    assert not any("s3" in line for line in best)
