"""Compile every kernel configuration without a GPU: run ``python -m benchmarks.aot [--arch 90 ...] [--quick]``.

Prints one line for each kernel, configuration and architecture of :mod:`benchmarks.registry`: registers, spilled bytes, shared
memory and its limit, the matrix instruction, and the instructions of the main loop for one weight. Exits with 1 when an expected
instruction is missing, something spills or shared memory is exceeded. Each architecture compiles in a process of its own: LLVM
errors abort.

``--json FILE`` writes the verdicts for ``tools/support_matrix.py``, which reads ``benchmarks/results/aot-*.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.registry import ARCHITECTURES, compile_cases
from benchmarks.registry.base import Case
from benchmarks.sass import MATRIX, inspect, main_loop, register_races
from sglang_modelopt_kernels.gemm.common import matrix_instruction
from sglang_modelopt_kernels.gemm.common.wgmma import register_race

SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory for one thread block: CUDA C++ Programming Guide, compute capabilities."""
TENSOR_MEMORY = 512
"""Columns of an SM's tensor memory: PTX ISA, tcgen05."""
FRAGMENT_ORDERS = ("[0, 1], [8, 0], [0, 8], [0, 16]", "[0, 1], [0, 2], [8, 0], [0, 16]")
"""Order of the rows and K elements of an operand in a thread's registers: of 16 bits, and of 8 bits (or 16 made from 8)."""
DROPPED = re.compile(r"\bVIADD\.16x2\s+\w+, \w+, 0x0\b")
"""Machine code of an ``add.s16x2`` whose constant ptxas 12.9 dropped."""
OPCODES = {"mma.sync": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
"""PTX opcode of each matrix instruction."""


@dataclass
class Result:
    """Result of one compilation; ``problems`` is empty for a kernel as expected."""

    registers: int
    spilled: int
    shared: int
    instruction: str
    per_weight: float | None
    problems: list[str] = field(default_factory=list)


QUICK_RECIPES = ("fp8_affine", "nvfp4_rotate")
"""KV recipes of the sample: of 4-bit codes, biases and a rotation, each is in one of them and not in the other."""
QUICK_GROUPED = ("grouped e2m1_e4m3/16 bf16", "grouped mxfp4/32 fp8e4nv", "grouped_dense bf16")
"""Products of experts of the sample, by the start of their names."""


def cases(arch: int) -> list[Case]:
    """Return every compilation for compute capability ``arch`` (times ten)."""
    return compile_cases(arch)


def quick(all_cases: list[Case]) -> list[Case]:
    """Select a sample: the first and the last configuration of each product, the last of each kernel around them, some of
    attention and of the experts.
    """
    attention = [case for case in all_cases if " D=" in case.name]
    experts = [case for case in all_cases if case.name.startswith("grouped")]
    others = [case for case in all_cases if case not in attention and case not in experts]
    ends: dict[tuple[str, ...], list[Case]] = {}
    for case in others:
        if not case.matrix:
            ends[case.kernel.fn.__name__,] = [case]
        elif "swizzled" not in case.name:
            kind = tuple(case.name.split(" ")[:2])
            ends[kind] = [*ends.get(kind, [])[:1], case]
    sample = [case for case in attention if case.name.endswith(tuple(f" {name} D=128" for name in QUICK_RECIPES))]
    of_experts = [next((case for case in experts if case.name.startswith(name)), None) for name in QUICK_GROUPED]
    return [*(case for kind in ends.values() for case in kind), *sample, *(case for case in of_experts if case)]


def _source_of(kernel: Any) -> Any:
    """Return the compiler's class of sources for a kernel in Triton or in Gluon."""
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def compile_case(case: Case, arch: int) -> Result:
    """Compile for ``sm_<arch>`` and inspect PTX and machine code.

    Raises:
        ValueError: the case lacks the type of an argument.
    """
    missing = set(case.kernel.arg_names) - case.types.keys() - case.constexprs.keys()
    if missing:
        raise ValueError(f"{case.name} lacks the type of {', '.join(sorted(missing))}")
    signature = {name: case.types.get(name, "constexpr") for name in case.kernel.arg_names}
    aligned = [name for name, type_ in case.types.items() if type_.startswith("*") or name in case.aligned]
    attributes = {(case.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = _source_of(case.kernel)(fn=case.kernel, signature=signature, constexprs=case.constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options)
    registers, spilled, sass = inspect(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    # wgmma and tcgen05 need a warpgroup (four warps), and tcgen05 a tile of more than eight queries.
    wanted = OPCODES[matrix_instruction(arch) if compiled.metadata.num_warps >= 4 else "mma.sync"]
    if case.matrix == "small" and wanted not in ptx:
        wanted = OPCODES["mma.sync"]
    found = re.search(re.escape(wanted) + r"[\w.:]*", ptx) if case.matrix else None
    threads = 32 * compiled.metadata.num_warps
    loop = main_loop(sass) if case.weights else []
    result = Result(
        registers,
        spilled,
        compiled.metadata.shared,
        found[0] if found else "-",
        len(loop) * threads / case.weights if loop else None,
    )
    if found and case.matrix not in ("any", "small") and case.matrix not in found[0]:
        result.problems.append(f"no {case.matrix}")
    if case.matrix and not found:
        result.problems.append(f"no {wanted}")
    if case.matrix and not MATRIX.search(sass):
        result.problems.append("no matrix instruction in the machine code")
    result.problems += [f"no {copy}" for copy in case.copies if copy not in ptx]
    if case.fragments and not makes_fragments(compiled.asm["ttgir"]):
        result.problems.append("inline assembly makes no operand")
    overwritten = register_races(sass)
    if overwritten:
        result.problems.append(f"{len(overwritten)} instructions write registers that a wgmma in flight reads")
    broken = register_race(ptx)
    if broken:
        result.problems.append(broken)
    if DROPPED.search(sass):
        result.problems.append("a packed 16-bit sum lost its constant")
    if spilled:
        result.problems.append(f"spills {spilled} bytes")
    if getattr(compiled.metadata, "tmem_size", 0) > TENSOR_MEMORY:
        result.problems.append(f"tensor memory above {TENSOR_MEMORY} columns")
    if result.shared > SHARED_MEMORY[arch]:
        result.problems.append(f"shared memory above {SHARED_MEMORY[arch]}")
    return result


def makes_fragments(ttgir: str) -> bool:
    """Return whether all results of inline assembly lie in registers in the order of a matrix instruction's left operand."""
    linear = dict(re.findall(r"^(#\w+) = #ttg\.linear<\{register = \[(.*?)\], lane", ttgir, re.M))
    results = re.findall(r"elementwise_inline_asm.*-> tensor<[\dx]+\w+, (.+)> loc", ttgir)
    return bool(results) and all(
        "dot_op<{opIdx = 0, parent = #mma" in result or linear.get(result, "").startswith(FRAGMENT_ORDERS)
        for result in results
    )


def run_architecture(arch: int, select: Callable[[list[Case]], list[Case]], verdicts: Path | None = None) -> int:
    """Compile the selected cases; print a line and append a JSON object to ``verdicts`` for each.

    Returns:
        How many have problems.
    """
    bad = 0
    for case in select(cases(arch)):
        result = compile_case(case, arch)
        per_weight = "-" if result.per_weight is None else f"{result.per_weight:.2f}"
        verdict = "; ".join(result.problems) or "ok"
        bad += bool(result.problems)
        print(
            f"sm_{arch:<4}{case.name:58}{result.registers:5}{result.spilled:7}{result.shared:8}/{SHARED_MEMORY[arch]:<7}"
            f"{per_weight:>7}  {result.instruction:50} {verdict}",
            flush=True,
        )
        if verdicts is not None:
            row = {"kernel": case.kernel.fn.__name__, "case": case.name, "arch": arch, "ok": not result.problems}
            with verdicts.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"problems": result.problems}) + "\n")
    return bad


def write_verdicts(file: Path, rows: Path, stopped: list[int], chosen: str) -> None:
    """Write the verdicts that :func:`run_architecture` appended to ``rows`` as one JSON file.

    Args:
        file: the file to write.
        rows: a JSON object to a line, for each compilation.
        stopped: architectures at which the compiler itself died, so that cases are missing.
        chosen: the cases that were compiled, in words.
    """
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else []
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    content = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"triton": triton.__version__},
        "commit": commit.stdout.strip(),
        "set": chosen,
        "stopped": stopped,
    }
    head = json.dumps(content, indent=2).removesuffix("\n}")
    body = ",\n".join(f"    {json.dumps(row)}" for row in found)
    file.write_text(f'{head},\n  "rows": [\n{body}\n  ]\n}}\n', encoding="utf-8")


def main() -> int:
    """Compile for each architecture in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--quick", action="store_true", help="one configuration of each product")
    parser.add_argument("--only", nargs="*", default=[], help="kernels whose names start with one of these patterns")
    parser.add_argument("--here", action="store_true", help="compile in this process")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the verdicts; with --here, append lines of them"
    )
    arguments = parser.parse_args()
    if arguments.here:

        def select(every: list[Case]) -> list[Case]:
            chosen = quick(every) if arguments.quick else every
            wanted = arguments.only or ["*"]
            return [case for case in chosen if any(fnmatchcase(f"{case.name} ", f"{name} *") for name in wanted)]

        return int(sum(run_architecture(arch, select, arguments.json) for arch in arguments.arch) > 0)
    print(f"triton {triton.__version__}")
    print(
        f"{'':7}{'kernel and configuration':58}{'regs':>5}{'spill':>7}{'shared':>8}/{'limit':7}{'i/w':>7}  instruction"
    )
    worst, stopped = 0, []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        for arch in arguments.arch:
            command = [sys.executable, "-m", "benchmarks.aot", "--here", "--arch", str(arch), "--json", str(rows)]
            chosen = [
                *(["--quick"] if arguments.quick else []),
                *(["--only", *arguments.only] if arguments.only else []),
            ]
            done = subprocess.run([*command, *chosen], env=os.environ, check=False)
            if done.returncode not in (0, 1):
                print(f"sm_{arch}: the compiler stopped with {done.returncode}")
                stopped.append(arch)
            worst = max(worst, int(done.returncode != 0))
        if arguments.json:
            every = "quick" if arguments.quick else "every configuration"
            only = f" of {', '.join(arguments.only)}" if arguments.only else ""
            write_verdicts(arguments.json, rows, stopped, every + only)
    return worst


if __name__ == "__main__":
    sys.exit(main())
