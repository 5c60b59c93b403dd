"""The conformance run: every kind of export through the real engine on a GPU, several at a time, judged by an independent reading.

    python tests/conformance run                    all cases
    python tests/conformance run --only 'kv-*'      some
    python tests/conformance run --tp 2             those over two GPUs, beside the same over one
    python tests/conformance run --device cpu       on a CPU, where SGLang runs on one

The exports come from the pack (``pack``). Each case is a process that is killed when its time is over; a case that fails, or
takes the GPU's context with it, ends no other.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType

from sglang_modelopt_ext.workflow.server.process_tree import ProcessTree
from tests.conformance.cases import Case, chosen
from tests.conformance.judge import compare
from tests.conformance.pack import ARCHIVE, MANIFEST, build, unpack
from tests.conformance.report import Outcome, as_json, as_markdown, line, table
from tests.support.server import server_variables

ROOT = Path(__file__).resolve().parents[2]


PORTS = 21000
"""The first port of the engines' process groups. Each engine has its own, below the range of ephemeral ports."""

KERNEL = re.compile(r"modelopt_ext: \d+ .*kernel ([\w.+]+)\s*$", re.MULTILINE)
CACHE = re.compile(r"modelopt_ext: KV cache .*", re.MULTILINE)
LONGEST_TAIL = 1200
"""Most characters of the end of a log in the results."""
REASON = re.compile(r"^(?:\[[^\]\n]*\] )?([\w.]*(?:Error|Exception|SystemExit)\b.*)$", re.MULTILINE)


class Runner:
    """A runner of cases, several at a time.

    Args:
        args: the command line.
        exports: folder of the unpacked pack.
        logs: folder for the output of the cases, and their results.
        gpus: number of GPUs; 0 on a CPU.
    """

    def __init__(self, args: argparse.Namespace, exports: Path, logs: Path, gpus: int) -> None:
        self.args, self.exports, self.logs, self.gpus = args, exports, logs, gpus
        self.begun = time.monotonic()
        self.done: list[Outcome] = []
        self._running: dict[str, ProcessTree] = {}

    def all(self, cases: list[Case]) -> list[Outcome]:
        """Run every case and print a line for each as it ends."""
        with ThreadPoolExecutor(self.args.workers) as pool:
            outcomes = list(pool.map(lambda item: self._one(*item, len(cases)), enumerate(cases)))
        self.compare(outcomes)
        return outcomes

    def stop(self) -> None:
        """End all running cases."""
        self.args.budget = 0
        for processes in list(self._running.values()):
            processes.kill()

    def _one(self, number: int, case: Case, count: int) -> Outcome:
        passed = time.monotonic() - self.begun
        if passed > self.args.budget - 30:
            outcome = Outcome(case, "not run", note=f"after {passed:.0f} s of {self.args.budget}")
        else:
            time.sleep(1.5 * number if number < self.args.workers else 0)  # stagger the starts
            try:
                outcome = self._run(number, case)
            except Exception as error:  # the other cases continue after any error
                outcome = Outcome(case, "failed", note=f"{type(error).__name__}: {error}")
        self.done.append(outcome)
        print(f"[{len(self.done):2}/{count} {time.monotonic() - self.begun:4.0f} s] {line(outcome)}", flush=True)
        return outcome

    def _run(self, number: int, case: Case) -> Outcome:
        log, result = self.logs / f"{case.name}.log", self.logs / f"{case.name}.json"
        command = [sys.executable, str(ROOT / "tests/conformance"), "worker", case.name, "--tp", str(self.args.tp)]
        command += ["--exports", str(self.exports), "--device", self.args.device]
        command += ["--port", str(self.args.ports + 8 * number), "--result", str(result)]
        start = time.monotonic()
        limit = min(self.args.case_seconds, self.args.budget - (start - self.begun))
        processes = self._running[case.name] = ProcessTree()
        try:
            process = processes.start(command, self._environment(number, case), log)
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
        finally:
            left = processes.kill()
            self._running.pop(case.name, None)
        seconds = time.monotonic() - start
        output = log.read_text(encoding="utf-8", errors="replace")
        served = sorted(set(KERNEL.findall(output)))
        cache = CACHE.search(output)
        outcome = Outcome(case, "failed", kernels=served, cache=cache.group(0) if cache else "", seconds=seconds)
        if left:
            outcome.notes.append(f"processes survived: {left}")
        if result.exists():
            outcome.result = json.loads(result.read_text(encoding="utf-8"))
            outcome.verdict = outcome.result["judgement"]["verdict"]
        elif code is None:
            outcome.note = f"not done after {limit:.0f} s; last line: {last_line(output)}"
        else:
            outcome.note = f"exit {code}: {reason(output)}"
        if not outcome.result:
            outcome.notes.append(f"end of its log: {tail(output)}")
        return outcome

    def _environment(self, number: int, case: Case) -> dict[str, str]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"TOKENIZERS_PARALLELISM": "false"}
        if self.args.device == "cpu":
            environment |= server_variables(case.tp)
        elif case.tp == 1 and self.gpus > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(number % self.gpus)
        if case.tp > 1:  # engines on the same GPUs share their memory
            environment["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"
        if not case.plugin:
            environment["SGLANG_PLUGINS"] = other_plugins()
        return environment | dict(case.env)

    def compare(self, outcomes: list[Outcome]) -> None:
        """Compare cases with those they must agree with."""
        by_name = {outcome.case.name: outcome for outcome in outcomes}
        for outcome in outcomes:
            other = by_name.get(outcome.case.same_as or "")
            if other is None or not outcome.result or not other.result:
                continue
            noise = outcome.result["judgement"]["noise_all"]
            variation = max(outcome.result["variation"], other.result["variation"])
            found = compare(outcome.case, outcome.result["scored"], other.result["scored"], noise, variation)
            outcome.agrees = found["right"]
            outcome.notes.append(found["note"])


def other_plugins() -> str:
    """Return the value of ``SGLANG_PLUGINS`` with which SGLang loads every plugin but this package's."""
    found = {point.name for point in entry_points(group="sglang.srt.plugins")} - {"modelopt_ext"}
    return ",".join(sorted(found)) or "none"  # an empty value would mean all


def reason(output: str) -> str:
    """Return the last error that a log has, else its last line."""
    errors = [match.group(1) for match in REASON.finditer(output)]
    ours = [error for error in errors if "ModelOptExtError" in error]
    return (ours or errors or [last_line(output)])[-1][:300]


def tail(output: str, lines: int = 25) -> str:
    """Return the lines of the last traceback of a log, else its last lines, in one line."""
    found = output.strip().splitlines()
    starts = [number for number, text in enumerate(found) if "Traceback (most recent call last)" in text]
    end = starts[-1] + 2 * lines if starts else len(found)
    return " | ".join(text.strip() for text in found[max(0, min(end, len(found)) - lines) : end])[-LONGEST_TAIL:]


def last_line(output: str) -> str:
    """Return the end of a log."""
    return (output.strip().splitlines() or [""])[-1][:200]


def commit() -> str:
    """Return the running revision, where git knows it."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def write(outcomes: list[Outcome], args: argparse.Namespace) -> None:
    """Write the results, where requested."""
    if not args.results:
        return
    target, page = args.results.with_suffix(".json"), args.results.with_suffix(".md")
    earlier = json.loads(target.read_text(encoding="utf-8")) if args.add and target.exists() else None
    content = as_json(outcomes, args.commit or commit(), earlier)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1), encoding="utf-8")
    page.write_text(as_markdown(content), encoding="utf-8")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "tests/conformance run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pack", type=Path, default=ROOT / ".exports", help="the folder that pack.py made")
    parser.add_argument("--only", metavar="A,B", help="cases by name, * for any part")
    parser.add_argument("--missing", type=Path, metavar="FILE", help="the cases that these results have no row of")
    parser.add_argument(
        "--part", metavar="I/N", help="of N parts the I-th, counted from 1; cases that must agree are in one"
    )
    parser.add_argument("--tp", type=int, default=1, help="2: the cases over two GPUs, and the same over one")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--workers", type=int, default=max(1, 3 * (os.cpu_count() or 1) // 4), help="engines at a time")
    parser.add_argument(
        "--ports", type=int, default=PORTS, help="the first port of the engines' process groups (default: %(default)s)"
    )
    parser.add_argument("--case-seconds", type=float, default=400, help="after which a case is killed")
    parser.add_argument(
        "--budget", type=float, default=3600, help="seconds of the whole run; what has not begun then is not run"
    )
    parser.add_argument("--logs", type=Path, help="keep what the cases print")
    parser.add_argument(
        "--results", type=Path, help="write FILE.json and FILE.md, such as benchmarks/results/served-h200"
    )
    parser.add_argument("--add", action="store_true", help="keep what --results has of other cases")
    parser.add_argument("--commit", default="", help="the revision, where git does not know it")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    return parser.parse_args()


def main() -> int:
    """Run the cases and return 0 when every verdict is the expected one."""
    args = arguments()
    cases = chosen(args.tp, args.only, args.missing)
    if args.part:
        part, parts = map(int, args.part.split("/"))
        roots = list(dict.fromkeys(case.same_as or case.name for case in cases))
        cases = [case for case in cases if roots.index(case.same_as or case.name) % parts == part - 1]
    if args.list:
        print("\n".join(f"{case.name}: {case.of.algo}, {case.of.family}, KV {case.kv}" for case in cases))
        return 0
    if not (args.pack / ARCHIVE).exists() or not (args.pack / MANIFEST).exists():
        print(f"no pack in {args.pack}: making it, which needs nvidia-modelopt", flush=True)
        build(args.pack)
    with tempfile.TemporaryDirectory(prefix="conformance-") as scratch:
        exports = Path(scratch) / "exports"
        unpack(args.pack, exports)
        logs = args.logs or Path(scratch) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        for stale in logs.glob("*.json"):
            stale.unlink()
        gpus = 0
        if args.device == "cuda":
            import torch

            gpus = torch.cuda.device_count()
            if gpus < args.tp:
                print(f"{gpus} GPUs are visible, {args.tp} needed", file=sys.stderr)
                return 2
        print(f"{len(cases)} cases, {args.workers} at a time, on {f'{gpus} GPU' if gpus else 'a CPU'}", flush=True)
        runner = Runner(args, exports, logs, gpus)

        def ended(signum: int, frame: FrameType | None) -> None:
            """End all processes and write the results so far, on a signal."""
            runner.stop()
            runner.compare(runner.done)
            write(runner.done, args)
            print(
                "\n" + table(runner.done) + f"\n\nended by a signal: {len(runner.done)} of {len(cases)} cases",
                flush=True,
            )
            shutil.rmtree(scratch, ignore_errors=True)
            os._exit(128 + signum)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, ended)
        outcomes = runner.all(cases)
    print("\n" + table(outcomes))
    write(outcomes, args)
    surprises = [outcome for outcome in outcomes if not outcome.as_expected]
    print(
        f"\n{len(outcomes) - len(surprises)} of {len(outcomes)} as expected"
        + "".join(f"\n  not: {line(o)}" for o in surprises)
    )
    return 1 if surprises else 0
