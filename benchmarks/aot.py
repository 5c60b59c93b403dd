"""What every kernel configuration compiles to, without a GPU: run ``python -m benchmarks.aot [--arch 90 ...] [--quick]``.

One line for each kernel, configuration and architecture: registers, spilled bytes, shared memory and its limit, the matrix
instruction, and the instructions of the main loop for one weight. Exits with 1 when an expected instruction is missing, something
spills or shared memory is exceeded. Each architecture compiles in a process of its own: LLVM errors abort.

``--json FILE`` writes the verdicts for ``tools/support_matrix.py``, which reads ``benchmarks/results/aot-*.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.aot_attention import QUICK_RECIPES, attention_cases
from benchmarks.aot_case import KINDS, Case
from benchmarks.aot_moe import QUICK_GROUPED, grouped_cases
from benchmarks.sass import MATRIX, inspect, main_loop, register_races
from sglang_modelopt_kernels.gemm.blackwell_common import takes_tiles
from sglang_modelopt_kernels.gemm.blackwell_common.kernel import tcgen05_kernel
from sglang_modelopt_kernels.gemm.blackwell_common.launch import HEIGHT, TILE
from sglang_modelopt_kernels.gemm.common import KernelConfig, matrix_instruction
from sglang_modelopt_kernels.gemm.common.kernel import finish_kernel
from sglang_modelopt_kernels.gemm.common.wgmma import register_race
from sglang_modelopt_kernels.gemm.fp4_blackwell import linear as fp4
from sglang_modelopt_kernels.gemm.fp4_blackwell.kernel import fp4_kernel
from sglang_modelopt_kernels.gemm.group_scaled import launch as groups
from sglang_modelopt_kernels.gemm.group_scaled.kernel import group_scaled_kernel
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell import linear as mxfp4
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell.kernel import mxfp4_widened_kernel
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import linear as folded
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper.kernel import folded_kernel, unfold_kernel
from sglang_modelopt_kernels.gemm.w4_decode.kernel import block_scaled_kernel, decode_kernel
from sglang_modelopt_kernels.gemm.w4_decode.launch import configs, descale, in_order, makes_operands
from sglang_modelopt_kernels.gemm.w8_decode import launch as eight_bit
from sglang_modelopt_kernels.gemm.w8_decode.kernel import byte_decode_kernel, eight_bit_kernel
from sglang_modelopt_kernels.quantize.blocks import quantize as blocks
from sglang_modelopt_kernels.quantize.blocks.kernel import quantize_blocks_kernel
from sglang_modelopt_kernels.quantize.fp8.kernel import quantize_static_kernel, quantize_token_kernel
from sglang_modelopt_kernels.quantize.int8.kernel import quantize_int8_kernel

ARCHITECTURES = (80, 89, 90, 100, 103, 120)
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 120: 99 << 10}
"""Bytes one block may use: CUDA C++ Programming Guide, compute capabilities."""
TENSOR_MEMORY = 512
"""Columns of an SM's tensor memory: PTX ISA, tcgen05."""
FRAGMENT_ORDERS = ("[0, 1], [8, 0], [0, 8], [0, 16]", "[0, 1], [0, 2], [8, 0], [0, 16]")
"""How the rows and inputs of a thread's registers go on, of operands of 16 bits and of 8 (or 16 that were made of 8)."""
DROPPED = re.compile(r"\bVIADD\.16x2\s+\w+, \w+, 0x0\b")
"""What ptxas 12.9 makes of ``add.s16x2`` with a constant: the constant is lost."""
OPCODES = {"mma.sync": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
"""Of each matrix instruction in PTX."""


@dataclass
class Result:
    """What a case compiled to; ``problems`` is empty when all is as it should be."""

    registers: int
    spilled: int
    shared: int
    instruction: str
    per_weight: float | None
    problems: list[str] = field(default_factory=list)


def product_case(
    name: str, kernel: Any, config: KernelConfig, operands: dict[str, str], numerics: dict[str, Any], matrix: str
) -> Case:
    """One configuration of a tiled product, with every scale and the bias, K a multiple of its tile and no split."""
    types = operands | dict.fromkeys(("row_scale_ptr", "out_scale_ptr"), "*fp32")
    types |= dict.fromkeys(("bias_ptr", "y_ptr"), "*bf16") | dict.fromkeys(("m", "n", "k", "row_step"), "i32")
    return Case(
        f"{name} {config}",
        kernel,
        types,
        {"DESCALE": 1.0, "HAS_ROW_SCALE": True, "HAS_BIAS": True, "EVEN_K": True, "SPLIT_K": 1}
        | {"BN": config.bn, "BM": config.bm, "BK": config.bk}
        | numerics,
        {"num_warps": config.warps, "num_stages": config.stages},
        aligned=("n", "k"),
        matrix=matrix,
        weights=config.bn * config.bk,
    )


def block_scaled_cases(arch: int) -> Iterator[Case]:
    """Every configuration that the launcher can choose."""
    dtypes = ("fp16", "bf16") if arch < 89 else ("fp8e4nv", "fp16", "bf16")
    for kind, group in KINDS:
        for dtype in dtypes:
            f16 = dtype != "bf16"
            operands = {"x_ptr": f"*{dtype}", "w_ptr": "*i16", "s_ptr": "*fp32" if kind == "int4_float" else "*u8"}
            numerics = {"KIND": kind, "GROUP": group, "F16": f16, "ASM": True, "DESCALE": descale(kind, f16)}
            for config in dict.fromkeys((*configs(kind, arch), *configs(kind, arch, 128))):
                name = f"block_scaled {kind}/{group} {dtype}"
                own = {"FRAGMENTS": makes_operands(kind, group, 4096, config, arch), "ORDERED": in_order(config)}
                own["WGMMA"] = matrix_instruction(arch) == "wgmma"
                of_x = {"x_ptr": "*fp16"} if own["ORDERED"] and f16 else {}
                case = product_case(name, block_scaled_kernel, config, operands | of_x, numerics | own, "any")
                yield dataclasses.replace(case, fragments=own["FRAGMENTS"])


BYTES = {
    "int8": ("i8", "fp32"),
    "e4m3": ("fp8e4nv", "fp32"),
    "e4m3_float": ("fp8e4nv", "fp32"),
    "e4m3_exponent": ("fp8e4nv", "u8"),
}
"""Triton's types of the codes and of the block scales of each kind of 8-bit weight."""
OPERANDS = {"torch.int8": "i8", "torch.float16": "fp16", "torch.bfloat16": "bf16"}


def eight_bit_cases(arch: int) -> Iterator[Case]:
    """Every configuration that the launcher can choose, and the decoding for many tokens."""
    for kind, (codes, scale) in BYTES.items():
        codes = codes if arch >= 89 else codes.replace("fp8e4nv", "u8")
        numerics = {"KIND": kind, "NATIVE": arch >= 89, "ASM": True}
        for dtype in eight_bit.TAKEN[kind]:
            name, math = OPERANDS[str(dtype)], eight_bit.math_of(kind, dtype)
            operands = {"x_ptr": f"*{name}", "w_ptr": f"*{codes}", "s_ptr": f"*{scale}"}
            own = {"MATH": math, "SCALE_ROWS": 128 if kind == "e4m3_float" else 1}
            own["WGMMA"] = matrix_instruction(arch) == "wgmma"
            for config in eight_bit.configs(kind, math, arch):
                # What has no instruction for int8 on Blackwell is left to mma.sync.
                wanted = "small" if math == "i8" else "any"
                yield product_case(
                    f"eight_bit {kind} {name}", eight_bit_kernel, config, operands, numerics | own, wanted
                )
            if math == "i8":
                continue
            types = {"w_ptr": f"*{codes}", "s_ptr": f"*{scale}", "y_ptr": f"*{name}"} | dict.fromkeys(
                ("first", "n", "k"), "i32"
            )
            constexprs = numerics | {"F16": math == "f16", "BN": 8, "BK": 512}
            yield Case(f"decode_bytes {kind} {name}", byte_decode_kernel, types, constexprs, {}, ("k",))


def group_scaled_cases(arch: int) -> Iterator[Case]:
    """INT4 for many tokens."""
    for dtype in ("fp16", "bf16") if arch < 89 else ("fp8e4nv", "fp16", "bf16"):
        operands = {"x_ptr": f"*{dtype}", "u_ptr": f"*{dtype}", "s_ptr": "*fp32", "first": "i32", "count": "i32"}
        config = groups.config_for(arch, 1 if dtype == "fp8e4nv" else 2)
        numerics = {"GROUP": 128, "ASM": True, "WIDTH": groups.WIDTH}
        case = product_case(f"group_scaled {dtype}", group_scaled_kernel, config, operands, numerics, "any")
        constexprs = {key: value for key, value in case.constexprs.items() if key in group_scaled_kernel.arg_names}
        yield dataclasses.replace(case, constexprs=constexprs, aligned=("n", "k", "first"))


def tcgen05_cases(name: str, element: str, group: int, every: tuple[KernelConfig, ...], matrix: str) -> Iterator[Case]:
    """The kernel with scales in tiles, through descriptors and through pointers: both are chosen, by the operands' sizes."""
    per_entry, scale = (2 if element == "e2m1" else 1), "fp8e4nv" if group == 16 else "u8"
    values = "u8" if element == "e2m1" else "fp8e4nv"
    for described in (True, False):
        for config in every:
            tiled = element == "e2m1" and takes_tiles(config.bm)
            box = f"{config.bk // group // 4},2,256"
            operands = {"x": f"*{values}", "w": "*u8", "s": f"*{scale}", "t": f"*{scale}"}
            if described:
                operands["x"] = f"tensordesc<{values}[{config.bm},{config.bk // per_entry}]>"
                operands["w"] = f"tensordesc<u8[{config.bn},{config.bk // 2}]>"
                operands["s"] = f"tensordesc<{scale}[{config.bn // TILE},{box}]>"
                operands["t"] = f"tensordesc<{scale}[{config.bm // TILE},{box}]>" if tiled else operands["t"]
            numerics = {"X": element, "GROUP": group, "NATIVE": True, "DESCRIBED": described, "TILED": tiled}
            numerics |= {"PERSISTENT": config.persistent, "HEIGHT": HEIGHT}
            label = name if described else f"{name},pointers"
            case = product_case(label, tcgen05_kernel, config, operands, numerics, matrix)
            copies = ("tcgen05.cp", "cp.async.bulk.tensor") if described else ("tcgen05.cp",)
            yield dataclasses.replace(case, copies=copies)


def mxfp4_cases(arch: int) -> Iterator[Case]:
    """The block-scaled matrix instruction, where the dispatch uses it."""
    if matrix_instruction(arch) == "tcgen05":
        yield from tcgen05_cases("mxfp4 fp8e4nv", "e4m3", 32, mxfp4.CONFIGS, "kind::mxf8f6f4.block_scale")
    elif arch >= 120:
        operands = {"x_ptr": "*fp8e4nv", "w_ptr": "*u8", "s_ptr": "*u8"}
        numerics = {"ASM": True, "DESCALE": mxfp4.WIDENED_DESCALE}
        wanted = "kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3"
        for config in mxfp4.PAIRED_CONFIGS:
            yield product_case("mxfp4 fp8e4nv", mxfp4_widened_kernel, config, operands, numerics, wanted)


def folded_cases(arch: int) -> Iterator[Case]:
    """MXFP4 made E4M3 in registers, before Blackwell."""
    if arch not in (89, 90):
        return
    operands = {"x_ptr": "*fp8e4nv", "w_ptr": "*u8", "s_ptr": "*u8"}
    for config in (*folded.configs(arch), *folded.configs(arch, 128)):
        for name, even in (("fp8e4nv", True), ("fp8e4nv,tail", False)):
            numerics = {"ASM": True, "EVEN_K": even}
            case = product_case(f"folded {name}", folded_kernel, config, operands, numerics, "e4m3")
            yield dataclasses.replace(case, fragments=True)
    types = {"w_ptr": "*i32", "s_ptr": "*u8", "y_ptr": "*i32"} | dict.fromkeys(("first", "n", "k"), "i32")
    yield Case("unfold fp8", unfold_kernel, types, {"ASM": True, "BN": 8}, {}, ("k",))


def fp4_cases(arch: int) -> Iterator[Case]:
    """FP4 on both sides, where the dispatch uses it."""
    if matrix_instruction(arch) == "tcgen05":
        for group, kind in ((16, "mxf4nvf4"), (32, "mxf4")):
            yield from tcgen05_cases(f"fp4 e2m1/{group}", "e2m1", group, fp4.TILED_CONFIGS, f"kind::{kind}.block_scale")
    elif arch >= 120:
        for group, scale in ((16, "fp8e4nv"), (32, "u8")):
            operands = {"x_ptr": "*u8", "w_ptr": "*u8", "s_ptr": f"*{scale}", "t_ptr": f"*{scale}"}
            # One kind for both, told apart by the inputs to a scale.
            wanted = f"kind::mxf4nvf4.block_scale.scale_vec::{64 // group}X"
            for config in fp4.CONFIGS:
                numerics = {"GROUP": group, "NATIVE": True}
                yield product_case(f"fp4 e2m1/{group}", fp4_kernel, config, operands, numerics, wanted)


def quantize_blocks_cases() -> Iterator[Case]:
    """Smoothing and rounding under block scales, to codes in either layout of the scales and to numbers."""
    for name in blocks.BLOCK_ACTIVATIONS:
        group, element = blocks.numerics(name)
        for values, swizzle in ((False, False), (False, True), (True, False)):
            types = dict.fromkeys(("x_ptr", "smoothing_ptr"), "*bf16") | {
                "input_scale_ptr": "*fp32",
                "scale_ptr": "*u8",
            }
            types |= {"y_ptr": "*bf16" if values else "*u8"} | dict.fromkeys(("k", "stride", "scale_columns"), "i32")
            constexprs = {"GROUP": group, "ELEMENT": element, "SMOOTH": True, "VALUES": values, "SWIZZLE": swizzle}
            label = "values" if values else "codes, scales swizzled" if swizzle else "codes"
            constexprs["BLOCKS"] = blocks.INPUTS // group
            case = f"quantize_blocks {name} {label}"
            yield Case(case, quantize_blocks_kernel, types, constexprs, {}, ("k", "stride", "scale_columns"))


def decode_cases(arch: int) -> Iterator[Case]:
    """Packed weights decoded to what a dense product multiplies: one, and those of all experts."""
    for kind, group in KINDS:
        fp8 = arch >= 89 and kind in ("e2m1_exponent", "int4_float")
        for out in ("fp16", "bf16", *(["fp8e4nv"] if fp8 else [])):
            for owned in (False, True):
                types = {"w_ptr": "*i16", "s_ptr": "*fp32" if kind == "int4_float" else "*u8", "y_ptr": f"*{out}"}
                types |= {"block_ptr": "*i32"} | dict.fromkeys(("first", "n", "k", "per"), "i32")
                constexprs = {"KIND": kind, "GROUP": group, "F16": out != "bf16", "FP8": out == "fp8e4nv"}
                constexprs |= {"ASM": True, "OWNED": owned, "BN": 16}
                name = f"decode {kind}/{group} {out}{',experts' if owned else ''}"
                yield Case(name, decode_kernel, types, constexprs, {}, ("k",))


def other_cases(arch: int) -> Iterator[Case]:
    """The kernels around the products."""
    out = "fp16" if arch < 89 else "fp8e4nv"
    floats = ("partial_ptr", "row_scale_ptr", "out_scale_ptr")
    types = dict.fromkeys(floats, "*fp32") | {"bias_ptr": "*bf16", "y_ptr": "*bf16"}
    types |= dict.fromkeys(("m", "n", "y_stride", "row_step"), "i32")
    for splits in (1, 16):
        constexprs = {"DESCALE": 1.0, "HAS_ROW_SCALE": True, "HAS_BIAS": True, "SPLITS": splits, "BN": 1024}
        yield Case(f"finish {splits} splits", finish_kernel, types, constexprs, {}, ("n", "y_stride"))
    types = {
        "x_ptr": "*bf16",
        "smoothing_ptr": "*bf16",
        "scale_ptr": "*fp32",
        "y_ptr": f"*{out}",
        "k": "i32",
        "stride": "i32",
    }
    yield Case(
        "quantize_fp8 static", quantize_static_kernel, types, {"SMOOTH": True, "BLOCK": 2048}, {}, ("k", "stride")
    )
    of_int8 = types | {"y_ptr": "*i8", "row_scale_ptr": "*fp32"}
    yield Case("quantize_int8", quantize_int8_kernel, of_int8, {"SMOOTH": True, "BLOCK": 2048}, {}, ("k", "stride"))
    constexprs = {"SMOOTH": True, "HAS_AMAX": True, "BLOCK": 2048}
    types = types | {"amax_ptr": "*fp32"}
    yield Case("quantize_fp8 token", quantize_token_kernel, types, constexprs, {}, ("k", "stride"))


def cases(arch: int) -> list[Case]:
    """Everything that may run on ``arch``."""
    products = [
        *block_scaled_cases(arch),
        *eight_bit_cases(arch),
        *group_scaled_cases(arch),
        *mxfp4_cases(arch),
        *folded_cases(arch),
        *fp4_cases(arch),
        *grouped_cases(arch),
    ]
    return [*products, *quantize_blocks_cases(), *decode_cases(arch), *other_cases(arch), *attention_cases(arch)]


def quick(all_cases: list[Case]) -> list[Case]:
    """A sample: of each kind of product the smallest and the largest configuration, and likewise the first and the last case of
    what stands around them; of attention and of experts some.
    """
    attention = [case for case in all_cases if " D=" in case.name]
    experts = [case for case in all_cases if case.name.startswith("grouped")]
    others = [case for case in all_cases if case not in attention and case not in experts]
    ends: dict[tuple[str, ...], list[Case]] = {}
    for case in others:
        if "swizzled" not in case.name:
            kind = tuple(case.name.split(" ")[:2])
            ends[kind] = [*ends.get(kind, [])[:1], case]
    sample = [case for case in attention if case.name.endswith(tuple(f" {name} D=128" for name in QUICK_RECIPES))]
    of_experts = [next((case for case in experts if case.name.startswith(name)), None) for name in QUICK_GROUPED]
    return [*(case for kind in ends.values() for case in kind), *sample, *(case for case in of_experts if case)]


def compile_case(case: Case, arch: int) -> Result:
    """Compiles for ``sm_<arch>`` and looks at the machine code."""
    missing = set(case.kernel.arg_names) - case.types.keys() - case.constexprs.keys()
    if missing:
        raise ValueError(f"{case.name} does not say the type of {', '.join(sorted(missing))}")
    signature = {name: case.types.get(name, "constexpr") for name in case.kernel.arg_names}
    aligned = [name for name, type_ in case.types.items() if type_.startswith("*") or name in case.aligned]
    attributes = {(case.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options)
    registers, spilled, sass = inspect(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    # Fewer warps than four do not make a warp group, and eight queries no tile of tcgen05.
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
    """Whether all that inline assembly makes has a thread's registers in the order of a matrix instruction's first operand."""
    linear = dict(re.findall(r"^(#\w+) = #ttg\.linear<\{register = \[(.*?)\], lane", ttgir, re.M))
    results = re.findall(r"elementwise_inline_asm.*-> tensor<[\dx]+\w+, (.+)> loc", ttgir)
    return bool(results) and all(
        "dot_op<{opIdx = 0, parent = #mma" in result or linear.get(result, "").startswith(FRAGMENT_ORDERS)
        for result in results
    )


def run_architecture(arch: int, select: Callable[[list[Case]], list[Case]], verdicts: Path | None = None) -> int:
    """Prints a line for each case, and appends a JSON object to ``verdicts``; returns how many have problems."""
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
    """Writes what :func:`run_architecture` appended to ``rows`` as one JSON file.

    Args:
        file: what is written.
        rows: a JSON object to a line, for each compilation.
        stopped: architectures at which the compiler itself died, so that cases are missing.
        chosen: which cases were compiled, in words.
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
    """Compiles for each architecture in a process of its own."""
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
