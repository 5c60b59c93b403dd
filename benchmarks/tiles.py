"""Which tiles of a product are fastest on the GPU at hand: run ``PYTHONPATH=kernels:. python -m benchmarks.tiles --help``.

Needs torch and Triton only, and knows nothing of architectures: configurations are made from sizes alone, first compiled and held
to float64 in other processes, a core each, and left out where they do not compile, spill, exceed shared memory or err. The others
are timed as ``benchmarks.gemm`` times products; of the fastest, other splits along K too. Prints for each kernel, shape and number
of tokens the time of what serves (whatever kernel that is), of this kernel's own choice, and of the five fastest, with their ratios
to ``torch._scaled_mm`` in FP8 and to cuBLAS in bf16.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.errors import TritonError

from benchmarks import gemm
from benchmarks.workers import Workers
from sglang_modelopt_kernels.gemm.common import KernelConfig, choose
from sglang_modelopt_kernels.gemm.common.launch import Plan
from sglang_modelopt_kernels.gemm.group_scaled import config_for
from sglang_modelopt_kernels.gemm.group_scaled.kernel import group_scaled_kernel
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import linear as folded
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper.kernel import folded_kernel
from sglang_modelopt_kernels.gemm.w4_decode import launch as block_scaled
from sglang_modelopt_kernels.gemm.w4_decode.kernel import block_scaled_kernel
from sglang_modelopt_kernels.gemm.w4_decode.packing import Kind
from sglang_modelopt_kernels.timing import COLD_BYTES, median_us

SHAPES = ("28672,4096", "4096,14336")
TOKENS = "16,64,128,256"
ROWS = 1040
"""Outputs of the problem a configuration is checked on: not whole tiles, and like those of models a multiple of 16."""
LARGEST_ERROR = 2.0**-8
"""Of a row's norm, as results are bf16."""
QUICK = (6, 3)
"""Launches and replays of the first timing; the best are timed in full."""
REFINED, SPLIT, SHOWN = 8, 4, 5
"""Of how many configurations the time is taken again, other splits are tried, and a line is printed."""


@dataclass(frozen=True)
class Tiled:
    """One kernel whose tiles are looked for.

    Attributes:
        kernel: the Triton function.
        product: in :data:`benchmarks.gemm.PRODUCTS`: its operands, its naive twin, and what serves.
        run: arguments as ``folded.run``.
        configs: of its own choice, by compute capability times ten.
        inputs: lengths of a tile along K.
        bits: of a weight and of an activation in shared memory, at least.
        splits: whether it can be split along K.
    """

    kernel: Any
    product: str
    run: Callable[..., torch.Tensor]
    configs: Callable[[int], Sequence[KernelConfig]]
    inputs: tuple[int, ...]
    bits: tuple[int, int] = (4, 8)
    splits: bool = True


def _block_scaled(kind: Kind, product: str, inputs: tuple[int, ...]) -> Tiled:
    return Tiled(block_scaled_kernel, product, block_scaled.run, functools.partial(block_scaled.configs, kind), inputs)


KERNELS = {
    "folded": Tiled(folded_kernel, "mxfp4 folded", folded.run, folded.configs, (128, 256, 512)),
    "block_scaled:e2m1_e4m3/16": _block_scaled("e2m1_e4m3", "nvfp4", (64, 128, 256)),
    "block_scaled:e2m1_exponent/32": _block_scaled("e2m1_exponent", "mxfp4", (64, 128, 256)),
    "block_scaled:int4_float/128": _block_scaled("int4_float", "int4", (128,)),
    "groups:int4_float/128": Tiled(
        group_scaled_kernel,
        "int4",
        block_scaled.run_groups,
        lambda capability: (config_for(capability, 1),),
        (64, 128),
        (8, 8),
        splits=False,
    ),
}
DEFAULT = ("folded", "block_scaled:e2m1_e4m3/16", "block_scaled:int4_float/128", "groups:int4_float/128")


def grid(tiled: Tiled, m: int, n: int, k: int, shared: int) -> Iterator[KernelConfig]:
    """Configurations for ``m`` tokens of a device with ``shared`` bytes of shared memory to a program."""
    most = max(16, triton.next_power_of_2(m))
    tokens = [bm for bm in (16, 32, 64, 128, 256) if bm <= most and (2 * bm >= most or bm == 256)]
    for bn, bm, bk, warps, stages in itertools.product((64, 128, 256), tokens, tiled.inputs, (2, 4, 8), (2, 3, 4)):
        bits, of_token = tiled.bits
        held = stages * bk * (bn * bits + bm * of_token) // 8
        # Accumulators of a thread; two warps are for the smallest tiles, and rows are not shared by warp groups of four.
        fits = bn * bm <= 128 * 32 * warps and bn >= 16 * warps and (warps > 2 or bm <= 32)
        if bn <= n and bk <= k and fits and held <= shared and 2 * bk * stages <= 2048:
            yield KernelConfig(bn, bm, bk, warps, stages)


def splits_around(config: KernelConfig, split: int, k: int) -> list[int]:
    """Other numbers of splits along K, each with two steps at least."""
    steps = triton.cdiv(k, config.bk)
    return [other for other in sorted({1, split // 2, 2 * split, 4 * split} - {0, split}) if steps >= 2 * other]


@dataclass(frozen=True)
class Job:
    """One configuration to be compiled and checked; what of ``m`` and ``k`` the compiler sees is the same for many."""

    kernel: str
    plan: Plan
    m: int
    k: int

    def key(self) -> tuple[Any, ...]:
        """Equal where the machine code is."""
        return (self.kernel, self.plan, self.m == 1, self.m % 16 == 0, self.k % self.plan[0].bk == 0)


@functools.cache
def _problem(kernel: str, m: int, k: int) -> tuple[Any, Mapping[str, Any], torch.Tensor]:
    product = gemm.PRODUCTS[KERNELS[kernel].product]
    weight, x = product.weight(ROWS, k), product.activations(m, k)
    return x, weight, product.naive(x, weight)


def check(job: Job) -> str:
    """What is wrong with a configuration on the GPU at hand, empty for nothing."""
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
            os._exit(1)  # nothing runs in this process any more
        return "does not compile"
    if spills:
        return "spills"
    error = ((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max()
    return "" if float(error) < LARGEST_ERROR else "wrong"


class Verdicts:
    """What :func:`check` said of every configuration asked for, each once; None where time ran out."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._known: dict[tuple[Any, ...], str | None] = {}

    def ask(self, jobs: Sequence[Job], deadline: float) -> None:
        """Compiles and checks what is not known yet."""
        new = {job.key(): job for job in reversed(jobs) if self._known.get(job.key()) is None}
        found = self._workers.map([*reversed(new.values())], deadline)
        self._known |= {job.key(): verdict for job, verdict in found.items()}

    def of(self, job: Job) -> str | None:
        """Of one asked for."""
        return self._known.get(job.key())

    def close(self) -> None:
        """Ends the processes."""
        self._workers.close()


@dataclass(frozen=True)
class Case:
    """One kernel, shape and number of tokens, and the plans to be tried for it, its own choice first."""

    kernel: str
    n: int
    k: int
    m: int
    plans: list[Plan]

    def jobs(self) -> list[Job]:
        """The compilations behind them."""
        return [Job(self.kernel, plan, self.m, self.k) for plan in self.plans]


def make_case(name: str, n: int, k: int, m: int) -> Case:
    """The kernel's choice and, in random order lest time always cuts off the same, the grid, split along K as by choice."""
    properties = torch.cuda.get_device_properties()
    tiled, processors = KERNELS[name], properties.multi_processor_count
    configs = list(grid(tiled, m, n, k, properties.shared_memory_per_block_optin))
    random.Random(0).shuffle(configs)

    def plan(configs: Sequence[KernelConfig]) -> Plan:
        config, split = choose(configs, m, n, k, processors)
        return config, split if tiled.splits else 1

    chosen = plan(tiled.configs(gemm.capability()))
    return Case(name, n, k, m, [*dict.fromkeys([chosen, *(plan([config]) for config in configs)])])


class Bench:
    """Times plans of one kernel and shape over enough copies of the weight to miss the cache."""

    def __init__(self, kernel: str, n: int, k: int) -> None:
        self._tiled = KERNELS[kernel]
        self._product = gemm.PRODUCTS[self._tiled.product]
        self._weights = [self._product.weight(n, k) for _ in range(2 * COLD_BYTES // (n * k) + 2)]
        self.stored = sum(self._weights[0][name].nbytes for name in ("codes", "scale"))

    def served(self, x: torch.Tensor) -> float:
        """Microseconds of what serves."""
        weights = self._weights
        return median_us(lambda i: self._product.run(x, weights[i % len(weights)], torch.bfloat16))

    def activations(self, m: int, k: int) -> torch.Tensor:
        """Random ones."""
        x: torch.Tensor = self._product.activations(m, k)
        return x

    def time(self, x: torch.Tensor, plan: Plan, *how: int) -> float:
        """Microseconds under ``plan``; ``how`` as of :func:`median_us`."""
        weights, run = self._weights, self._tiled.run
        return median_us(lambda i: run(x, weights[i % len(weights)]["weight"], None, None, torch.bfloat16, plan), *how)


def measure(case: Case, bench: Bench, verdicts: Verdicts, seconds: float) -> dict[Plan, float]:
    """Microseconds of each plan that is right, as many as there is time for, the fastest and other splits of them in full."""
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
    """The lines of one case: what serves, the kernel's own choice and the fastest, in microseconds, beside FP8 and bf16."""
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
    """How many configurations were left out of all of ``cases``, and why."""
    found = {job.key(): verdicts.of(job) for case in cases for job in case.jobs()}
    reasons = Counter("no time" if verdict is None else verdict or "right" for verdict in found.values())
    return ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", default=list(DEFAULT), choices=KERNELS, help="default: %(default)s")
    parser.add_argument("--tokens", default=TOKENS, help="default: %(default)s")
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), help="N,K of the weight; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=210.0, help="about how long; default: %(default)s")
    parser.add_argument("--processes", type=int, default=max((os.cpu_count() or 2) - 1, 1), help="that compile")
    return parser.parse_args()


def main() -> None:
    """Compiles and checks everything, then times it kernel by kernel and shape by shape."""
    arguments = parse()
    start = time.monotonic()
    tokens = [int(m) for m in arguments.tokens.split(",")]
    shapes = [(int(n), int(k)) for n, k in (shape.split(",") for shape in arguments.shape)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    cases = [make_case(name, n, k, m) for name in arguments.kernel for n, k in shapes for m in tokens]
    verdicts = Verdicts(Workers(check, arguments.processes, "ends the process"))
    # Of every case some: what time cuts off is cut off everywhere.
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
