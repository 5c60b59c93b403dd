"""Launch every kernel thousands of times and count the results that differ: run ``python -m benchmarks.stress``.

A kernel of this package repeats bit for bit, so one differing result is a race, or a miscompilation. Each case of
:mod:`benchmarks.registry` is built on the GPU at hand with sizes that fill it; its output is poisoned with NaN, compared once with
float64, and then compared with its first result, bit for bit, on the device. Several processes share the GPU, so that each kernel
runs beside others (``--workers``).

Prints a line for each case that differs or errs, and a table by kernel; ``--report FILE`` writes it as a page. Exits with 1 when a
result differed. Needs torch, Triton and ``PYTHONPATH=kernels:.``.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from benchmarks.registry import stress_cases
from benchmarks.registry.base import Launch, StressCase
from benchmarks.registry.operands import capability
from benchmarks.workers import Workers

LAUNCHES = 3000
SHORT = 100
WORKERS = 8


@dataclass(frozen=True)
class Result:
    """Outcome of a case; ``error`` is relative to float64, None where there is no reference."""

    name: str
    launches: int = 0
    differing: int = 0
    error: float | None = None
    tolerance: float = 0.0
    failed: str = ""

    @property
    def wrong(self) -> bool:
        """Return whether a result differed, erred or was missing."""
        return bool(self.failed) or self.differing > 0 or (self.error is not None and not self.error < self.tolerance)

    def describe(self) -> str:
        """Return one line of text."""
        error = "-" if self.error is None else f"{self.error:.2g}"
        outcome = self.failed or f"{self.differing} of {self.launches} differ, error {error}"
        return f"{self.name:66} {outcome}"


def stress(case: StressCase, launches: int) -> Result:
    """Run one case; an exception is its result."""
    try:
        launch = case.build()
        first, error = _poisoned(launch), None
        if launch.expected is not None:
            norm = launch.expected.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
            error = float(((first.double() - launch.expected).norm(dim=1) / norm).nan_to_num(torch.inf).max())
        differing = torch.zeros((), dtype=torch.int64, device="cuda")
        bits = _bits(first)
        for _ in range(launches):
            differing += (_bits(launch.call()) != bits).any()
        return Result(case.name, launches, int(differing), error, launch.tolerance)
    except Exception as failure:  # a compiler's, a driver's or ours: it must not end the other cases
        reason = str(failure).strip() or "no message"
        return Result(case.name, failed=f"{type(failure).__name__}: {reason.splitlines()[0][:160]}")


def _poisoned(launch: Launch) -> torch.Tensor:
    """Launch once with new tensors full of NaN, and return a copy of the result."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    try:
        return launch.call().clone()
    finally:
        torch.use_deterministic_algorithms(False)


def _bits(y: torch.Tensor) -> torch.Tensor:
    return y.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[y.element_size()])


@functools.cache
def _cases() -> dict[str, StressCase]:
    return {case.name: case for case in stress_cases(capability())}


def run_job(job: tuple[str, int]) -> Result:
    """Run a job ``(case name, launches)`` in a worker process."""
    warnings.filterwarnings("ignore")
    return stress(_cases()[job[0]], job[1])


def table(results: Iterable[Result]) -> list[str]:
    """Format a Markdown table, by kernel: cases, launches, differing, failed, largest error."""
    lines = [
        "| kernel | cases | launches | differing | failed or wrong | largest error |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(" ".join(result.name.split(" ")[:2]), []).append(result)
    groups["all"] = [result for group in groups.values() for result in group]
    for name, group in groups.items():
        launches, differing = sum(one.launches for one in group), sum(one.differing for one in group)
        error = max((one.error for one in group if one.error is not None), default=None)
        cells = [name, len(group), launches, differing, sum(one.wrong for one in group)]
        lines.append("| " + " | ".join(map(str, [*cells, "-" if error is None else f"{error:.1e}"])) + " |")
    return lines


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=LAUNCHES, help="of each case (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help=f"{SHORT} launches of each case")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes on the GPU (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names start with one of these")
    parser.add_argument(
        "--seconds", type=float, default=1800.0, help="begin no case after so long (default: %(default)s)"
    )
    parser.add_argument("--report", type=Path, help="write the table as a page")
    return parser.parse_args()


def main() -> int:
    """Run the cases in processes of their own and print what differed."""
    arguments = parse()
    launches = SHORT if arguments.short else arguments.launches
    names = [name for name in _cases() if not arguments.only or name.startswith(tuple(arguments.only))]
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}"
    print(f"{machine}; {len(names)} cases, {launches} launches each, {arguments.workers} processes", flush=True)
    started = time.monotonic()
    workers = Workers(run_job, arguments.workers, None)
    done = workers.map([(name, launches) for name in names], started + arguments.seconds)
    results = [done[name, launches] or Result(name, failed="not run, or its process died") for name in names]
    workers.close()
    for result in results:
        if result.wrong:
            print(result.describe())
    lines = table(results)
    print("\n".join(lines))
    print(f"{time.monotonic() - started:.0f} s")
    if arguments.report:
        wrong = [f"- {result.describe()}" for result in results if result.wrong]
        heading = (
            f"# Stress run\n\n`python -m benchmarks.stress`, {machine}, {arguments.workers} processes at a time.\n\n"
        )
        arguments.report.write_text(heading + "\n".join([*lines, "", *wrong]) + "\n", encoding="utf-8")
    return int(any(result.wrong for result in results))


if __name__ == "__main__":
    sys.exit(main())
