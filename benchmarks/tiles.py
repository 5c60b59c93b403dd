"""Search the fastest tiles of a product on the GPU at hand: run ``PYTHONPATH=kernels:. python -m benchmarks.tiles --help``.

Needs torch and Triton only, and no knowledge of the architecture: configurations are made from sizes alone, first compiled and
compared with float64 in other processes, a core each, and rejected where they do not compile, spill, exceed shared memory or err.
The others are timed as ``benchmarks.gemm`` times products; the fastest with other splits along K too. Prints for each kernel, shape
and number of tokens the time of the kernel that dispatch runs, of this kernel's own choice, and of the five fastest, with their
ratios to ``torch._scaled_mm`` in FP8 and to cuBLAS in bf16.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.errors import TritonError

from benchmarks import gemm
from benchmarks.registry import tile_candidates
from benchmarks.registry.base import TOLERANCE, Tiled
from benchmarks.registry.operands import capability
from benchmarks.workers import Workers
from sglang_modelopt_kernels.gemm.common import KernelConfig, choose
from sglang_modelopt_kernels.gemm.common.launch import Plan
from sglang_modelopt_kernels.timing import COLD_BYTES, median_us

SHAPES = ("28672,4096", "4096,14336")
TOKENS = "16,64,128,256"
ROWS = 1040
"""N of the problem a configuration is checked on: no multiple of a tile, and, as in models, a multiple of 16."""
QUICK = (6, 3)
"""Launches and replays of the first timing; the fastest are timed again in full."""
REFINED, SPLIT, SHOWN = 8, 4, 5
"""Configurations that are timed again, that are tried with other splits, and that get a line."""


KERNELS = tile_candidates()
DEFAULT = ("folded", "block_scaled:e2m1_e4m3/16", "block_scaled:int4_float/128", "groups:int4_float/128")


def grid(tiled: Tiled, m: int, n: int, k: int, shared: int) -> Iterator[KernelConfig]:
    """Yield the candidates for ``m`` tokens on a device with ``shared`` bytes of shared memory for a program."""
    most = max(16, triton.next_power_of_2(m))
    tokens = [bm for bm in (16, 32, 64, 128, 256) if bm <= most and (2 * bm >= most or bm == 256)]
    for bn, bm, bk, warps, stages in itertools.product((64, 128, 256), tokens, tiled.bks, (2, 4, 8), (2, 3, 4)):
        bits, of_token = tiled.bits
        held = stages * bk * (bn * bits + bm * of_token) // 8
        # At most 128 accumulators for a thread; two warps for the smallest tiles only; 16 rows for each warp at least.
        fits = bn * bm <= 128 * 32 * warps and bn >= 16 * warps and (warps > 2 or bm <= 32)
        if bn <= n and bk <= k and fits and held <= shared and 2 * bk * stages <= 2048:
            yield KernelConfig(bn, bm, bk, warps, stages)


def splits_around(config: KernelConfig, split: int, k: int) -> list[int]:
    """Return other numbers of splits along K, each with two steps at least."""
    steps = triton.cdiv(k, config.bk)
    return [other for other in sorted({1, split // 2, 2 * split, 4 * split} - {0, split}) if steps >= 2 * other]


@dataclass(frozen=True)
class Job:
    """One configuration to compile and check. Jobs whose ``m`` and ``k`` the compiler does not tell apart have one key."""

    kernel: str
    plan: Plan
    m: int
    k: int

    def key(self) -> tuple[Any, ...]:
        """Return a key that is equal where the machine code is."""
        return (self.kernel, self.plan, self.m == 1, self.m % 16 == 0, self.k % self.plan[0].bk == 0)


@functools.cache
def _problem(kernel: str, m: int, k: int) -> tuple[Any, Mapping[str, Any], torch.Tensor]:
    product = gemm.PRODUCTS[KERNELS[kernel].product]
    weight, x = product.weight(ROWS, k), product.activations(m, k)
    return x, weight, product.naive(x, weight)


def check(job: Job) -> str:
    """Return the fault of a configuration on the GPU at hand; empty for none."""
    tiled = KERNELS[job.kernel]
    try:
        x, weight, expected = _problem(job.kernel, job.m, job.k)
        cache = tiled.kernel.device_caches[torch.cuda.current_device()][0]
        before = set(cache)
        y = tiled.run(x, weight["weight"], None, None, torch.bfloat16, job.plan)
        spills = sum(cache[key].n_spills or 0 for key in set(cache) - before)
    except triton.runtime.errors.OutOfResources as error:
        return f"{error.name} exceeded"
    except (RuntimeError, ValueError, TritonError) as error:
        if "CUDA error" in str(error):
            os._exit(1)  # the CUDA context is lost: no kernel runs in this process again
        return "does not compile"
    if spills:
        return "spills"
    error = ((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max()
    return "" if float(error) < TOLERANCE else "wrong"


class Verdicts:
    """Verdicts of :func:`check`, one for each configuration asked for; None where time ran out."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._known: dict[tuple[Any, ...], str | None] = {}

    def ask(self, jobs: Sequence[Job], deadline: float) -> None:
        """Compile and check the jobs that have no verdict yet."""
        new = {job.key(): job for job in reversed(jobs) if self._known.get(job.key()) is None}
        found = self._workers.map([*reversed(new.values())], deadline)
        self._known |= {job.key(): verdict for job, verdict in found.items()}

    def of(self, job: Job) -> str | None:
        """Return the verdict on a job that was asked for."""
        return self._known.get(job.key())

    def close(self) -> None:
        """End the processes."""
        self._workers.close()


@dataclass(frozen=True)
class Case:
    """One kernel, shape and number of tokens, and the plans to try for it, the kernel's own choice first."""

    kernel: str
    n: int
    k: int
    m: int
    plans: list[Plan]

    def jobs(self) -> list[Job]:
        """Return the compilation of each plan."""
        return [Job(self.kernel, plan, self.m, self.k) for plan in self.plans]


def make_case(name: str, n: int, k: int, m: int) -> Case:
    """Make a case: the kernel's choice, then the grid in random order, so that a time limit does not always cut off the same."""
    properties = torch.cuda.get_device_properties()
    tiled, sms = KERNELS[name], properties.multi_processor_count
    configs = list(grid(tiled, m, n, k, properties.shared_memory_per_block_optin))
    random.Random(0).shuffle(configs)

    def plan(configs: Sequence[KernelConfig]) -> Plan:
        config, split = choose(configs, m, n, k, sms)
        return config, split if tiled.splits else 1

    chosen = plan(tiled.configs(capability()))
    return Case(name, n, k, m, [*dict.fromkeys([chosen, *(plan([config]) for config in configs)])])


class Bench:
    """Timer of the plans of one kernel and shape, over enough copies of the weight to miss L2."""

    def __init__(self, kernel: str, n: int, k: int) -> None:
        self._tiled = KERNELS[kernel]
        self._product = gemm.PRODUCTS[self._tiled.product]
        self._weights = [self._product.weight(n, k) for _ in range(2 * COLD_BYTES // (n * k) + 2)]
        self.stored = sum(self._weights[0][name].nbytes for name in ("codes", "scale"))

    def served(self, x: torch.Tensor) -> float:
        """Return the microseconds of the product that dispatch runs."""
        weights = self._weights
        return median_us(lambda i: self._product.run(x, weights[i % len(weights)], torch.bfloat16))

    def activations(self, m: int, k: int) -> torch.Tensor:
        """Make random activations ``[M, K]``."""
        x: torch.Tensor = self._product.activations(m, k)
        return x

    def time(self, x: torch.Tensor, plan: Plan, *how: int) -> float:
        """Return the microseconds under ``plan``; ``how`` are the launches and replays of :func:`median_us`."""
        weights, run = self._weights, self._tiled.run
        return median_us(lambda i: run(x, weights[i % len(weights)]["weight"], None, None, torch.bfloat16, plan), *how)


def measure(case: Case, bench: Bench, verdicts: Verdicts, seconds: float) -> dict[Plan, float]:
    """Time the plans that passed, as many as ``seconds`` allow: microseconds, the fastest and other splits of them in full."""
    deadline = time.monotonic() + seconds
    x = bench.activations(case.m, case.k)
    times: dict[Plan, float] = {}
    for job in case.jobs():
        if verdicts.of(job) == "" and (time.monotonic() < deadline or not times):
            times[job.plan] = bench.time(x, job.plan, *QUICK)
    fastest = sorted(times, key=times.__getitem__)
    split_further = fastest[:SPLIT] if KERNELS[case.kernel].splits else []
    others = [(config, other) for config, split in split_further for other in splits_around(config, split, case.k)]
    jobs = [Job(case.kernel, plan, case.m, case.k) for plan in others]
    verdicts.ask(jobs, deadline + seconds / 4)
    times |= {job.plan: bench.time(x, job.plan, *QUICK) for job in jobs if verdicts.of(job) == ""}
    again = {case.plans[0], *sorted(times, key=times.__getitem__)[:REFINED]} & times.keys()
    return times | {plan: bench.time(x, plan) for plan in again}


def report(case: Case, times: Mapping[Plan, float], served: float, peers: tuple[float, float], stored: int) -> str:
    """Format a case: dispatch's product, the kernel's own choice and the fastest, in microseconds and relative to FP8 and bf16."""
    fp8, bf16 = peers
    lines = [f"{case.kernel} {case.n}x{case.k}, {case.m} tokens: {len(times)} timed, fp8 {fp8:.1f}, bf16 {bf16:.1f} us"]

    def line(label: str, plan: str, us: float) -> str:
        return (
            f"  {label:7}{plan:26}{us:9.1f} us{stored / us / 1e3:7.0f} GB/s{us / fp8:7.2f} /fp8{us / bf16:7.2f} /bf16"
        )

    lines.append(line("served", "", served))
    chosen = case.plans[0]
    ranks = [("chosen", chosen)] if chosen in times else []
    ranks += [(str(rank), plan) for rank, plan in enumerate(sorted(times, key=times.__getitem__)[:SHOWN], 1)]
    lines += [line(label, f"{plan[0]} split {plan[1]}", times[plan]) for label, plan in ranks]
    return "\n".join(lines)


def count(cases: Sequence[Case], verdicts: Verdicts) -> str:
    """Count the configurations of ``cases`` by verdict, in one line."""
    found = {job.key(): verdicts.of(job) for case in cases for job in case.jobs()}
    reasons = Counter("no time" if verdict is None else verdict or "right" for verdict in found.values())
    return ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", default=list(DEFAULT), choices=KERNELS, help="default: %(default)s")
    parser.add_argument("--tokens", default=TOKENS, help="default: %(default)s")
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), help="N,K of the weight; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=210.0, help="about how long; default: %(default)s")
    parser.add_argument("--processes", type=int, default=max((os.cpu_count() or 2) - 1, 1), help="that compile")
    return parser.parse_args()


def main() -> None:
    """Compile and check every configuration, then time them kernel by kernel and shape by shape."""
    arguments = parse()
    start = time.monotonic()
    tokens = [int(m) for m in arguments.tokens.split(",")]
    shapes = [(int(n), int(k)) for n, k in (shape.split(",") for shape in arguments.shape)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    cases = [make_case(name, n, k, m) for name in arguments.kernel for n, k in shapes for m in tokens]
    verdicts = Verdicts(Workers(check, arguments.processes, "ends the process"))
    # Interleave the cases: a time limit then cuts off some plans of each, not all plans of the last.
    jobs = [job for row in itertools.zip_longest(*(case.jobs() for case in cases)) for job in row if job]
    verdicts.ask(jobs, start + 0.5 * arguments.seconds)
    print(f"configurations: {count(cases, verdicts)}; {time.monotonic() - start:.0f} s", flush=True)
    peers = {(n, k): [*zip(gemm.time_fp8(n, k, tokens), gemm.time_bf16(n, k, tokens), strict=True)] for n, k in shapes}
    left = len(cases)
    for (name, n, k), group in itertools.groupby(cases, lambda case: (case.kernel, case.n, case.k)):
        bench = Bench(name, n, k)
        for case in group:
            seconds = max(start + arguments.seconds - time.monotonic(), 0.0) / left
            times = measure(case, bench, verdicts, seconds)
            served = bench.served(bench.activations(case.m, k))
            print(report(case, times, served, peers[n, k][tokens.index(case.m)], bench.stored), flush=True)
            left -= 1
    verdicts.close()
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
