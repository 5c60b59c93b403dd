"""The kernels compile for every architecture, to matrix instructions, without spilling: a part of ``python -m benchmarks.aot``."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from benchmarks import aot
from benchmarks.registry.base import Case
from benchmarks.registry.operands import KINDS, TRITON_TYPES
from sglang_modelopt_kernels.gemm.fp4_blackwell import linear as fp4
from sglang_modelopt_kernels.gemm.group_scaled import config_for
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell import linear as mxfp4
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import linear as folded_linear
from sglang_modelopt_kernels.gemm.w4_decode import launch as block_scaled
from sglang_modelopt_kernels.gemm.w4_stream import launch as streamed
from sglang_modelopt_kernels.gemm.w8_decode import launch as eight_bit
from sglang_modelopt_kernels.moe.grouped import launch as grouped
from sglang_modelopt_kernels.moe.grouped.dense import launch as dense
from sglang_modelopt_kernels.moe.grouped.weights import TILES
from sglang_modelopt_kernels.moe.streamed import launch as streamed_experts

ROOT = Path(__file__).resolve().parents[2]


BLACKWELL = ("fp4", "mxfp4", "grouped mxfp4*")
"""Kernels of Blackwell's block-scaled instructions."""


@pytest.mark.parametrize(
    ("arch", "only"),
    [
        (90, ("*",)),
        (100, BLACKWELL),
        (120, BLACKWELL),
        *(pytest.param(arch, ("*",), marks=pytest.mark.full) for arch in (80, 89, 100, 120)),
    ],
)
def test_quick(arch: int, only: tuple[str, ...]) -> None:
    """sm_103 is sm_100 to Triton's choices, and left to the whole report."""
    command = [sys.executable, "-m", "benchmarks.aot", "--here", "--quick", "--arch", str(arch), "--only", *only]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    names = [f"{case.name} " for case in aot.quick(aot.cases(arch))]
    assert len(lines) == sum(any(fnmatchcase(name, f"{one} *") for one in only) for name in names) > 0
    assert all(line.endswith(" ok") for line in lines)


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_every_configuration_is_listed(arch: int) -> None:
    """Whatever the launcher can choose has a case."""
    names = " ".join(case.name for case in aot.cases(arch))
    for kind, _ in KINDS:
        assert all(str(config) in names for k in (128, 256) for config in block_scaled.configs(kind, arch, k))
    folded = (*folded_linear.configs(arch), *folded_linear.configs(arch, 128)) if arch in (89, 90) else ()
    ways = ("fp8e4nv", "fp8e4nv,tail")
    listed = [case.name for case in aot.cases(arch) if case.name.startswith("folded ")]
    tiled = [f"folded tiled fp8e4nv {config}" for config in streamed.TILED if arch == 90]
    assert listed == [*(f"folded {way} {config}" for config in folded for way in ways), *tiled]
    for kind, configs in streamed.STREAMED.items() if arch == 90 else ():
        assert all(f"streamed {kind} {config}" in names for config in configs)
    for config in streamed_experts.CONFIGS if arch == 90 else ():
        assert f"streamed experts {config}" in names
    for kind in eight_bit.TAKEN:
        listed = [case.name for case in aot.cases(arch) if case.name.startswith(f"eight_bit {kind} ")]
        assert listed == [
            f"eight_bit {kind} {TRITON_TYPES[dtype]} {config}"
            for dtype in eight_bit.TAKEN[kind]
            for config in eight_bit.configs(kind, eight_bit.math_of(kind, dtype), arch)
        ]
    dtypes = {"fp16": 2, "bf16": 2} | ({"fp8e4nv": 1} if arch >= 89 else {})
    for dtype, itemsize in dtypes.items():
        assert f"group_scaled {dtype} {config_for(arch, itemsize)}" in names
    swizzled = arch in (100, 103)
    for product, types, every in (
        ("fp4", ("e2m1/16", "e2m1/32"), fp4.SWIZZLED_CONFIGS if swizzled else fp4.CONFIGS),
        ("mxfp4", ("fp8e4nv",), mxfp4.CONFIGS if swizzled else mxfp4.PAIRED_CONFIGS),
    ):
        listed = [case.name for case in aot.cases(arch) if case.name.startswith(f"{product} ")]
        ways = ("", ",pointers") if swizzled else ("",)
        expected = [f"{product} {type_}{way} {config}" for type_ in types for way in ways for config in every]
        assert listed == (expected if arch >= 100 else [])
    for kind, dtypes in grouped.TAKEN.items():
        for dtype in dtypes:
            if (kind == "mxfp4" and arch not in (100, 103)) or kind in TILES:
                continue
            math = grouped.math_of(kind, dtype, arch)
            chosen = [str(config) for k in (128, 256) for config in grouped.configs(kind, math, arch, k)]
            # E4M3 activations are float16 ones before sm_89.
            name = {"torch.float8_e4m3fn": "fp8e4nv" if arch >= 89 else "fp16", "torch.float16": "fp16"}.get(
                str(dtype), "bf16"
            )
            assert all(re.search(rf"grouped {kind}/\d+ {name} {config}", names) for config in chosen)
            scaled = kind in ("int4_float", "e4m3_float")
            for operand in (dtype, torch.float16 if dtype == torch.float8_e4m3fn else dtype):
                if kind == "mxfp4" or (arch < 89 and operand == torch.float8_e4m3fn):
                    continue
                of_type = {torch.float8_e4m3fn: "fp8e4nv", torch.float16: "fp16"}.get(operand, "bf16")
                for config in dense.configs(operand, scaled, arch):
                    assert f"grouped_dense {of_type}{',scaled' if scaled else ''} {config}" in names


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An instruction that is not there, and shared memory above the limit."""
    case = next(case for case in aot.cases(90) if case.name.startswith("finish"))
    assert not aot.compile_case(case, 90).problems
    monkeypatch.setitem(aot.SHARED_MEMORY, 90, -1)
    broken = Case(case.name, case.kernel, case.types, case.constexprs, case.options, case.aligned, matrix="any")
    assert len(aot.compile_case(broken, 90).problems) == 3


def test_a_missing_copy_is_found() -> None:
    """A kernel that loads through pointers where TMA is expected."""
    case = next(case for case in aot.cases(90) if case.name.startswith("finish"))
    broken = Case(case.name, case.kernel, case.types, case.constexprs, case.options, copies=("cp.async.bulk.tensor",))
    assert aot.compile_case(broken, 90).problems == ["no cp.async.bulk.tensor"]


def test_fragments_elsewhere_are_found() -> None:
    """Inline assembly whose result is a matrix instruction's operand, and one whose result is converted to it."""
    line = "%0 = tt.elementwise_inline_asm {{}} %1 : tensor<8x64xi8, {0}> -> tensor<8x64xi8, {0}> loc(#loc1)\n"
    operand = line.format("#ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 4}>")
    assert aot.makes_fragments(operand)
    assert not aot.makes_fragments(operand + line.format("#blocked"))
    assert not aot.makes_fragments("")


def test_the_main_loop_is_the_one_with_matrix_instructions() -> None:
    sass = """
        /*0000*/ MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/ LDG.E R2, [R4] ;
        /*0020*/ @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/ LOP3.LUT R2, R2, R3, RZ, 0xc0, !PT ;
        /*0040*/ HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/ @P1 BRA `(.L_x_1) ;
        /*0060*/ BRA `(.L_x_2) ;
.L_x_2:
        /*0070*/ EXIT ;
"""
    assert [line.split()[0] for line in aot.main_loop(sass)] == ["LOP3.LUT", "HMMA.16816.F32", "@P1"]
    assert aot.main_loop("/*0000*/ EXIT ;") == []


def test_waits_behind_the_code_are_no_loops() -> None:
    """The inner of two loops, without what is jumped to and back from to wait for a barrier."""
    sass = """
        /*0000*/ MOV R1, R2 ;
.L_x_0:
        /*0010*/ UTCQMMA gdesc[UR4] ;
        /*0020*/ UTCQMMA gdesc[UR4] ;
.L_x_1:
        /*0030*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR15], R0 ;
        /*0040*/ @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/ UTCQMMA gdesc[UR6] ;
        /*0060*/ @P1 BRA `(.L_x_1) ;
        /*0070*/ STG.E [R4], R2 ;
        /*0080*/ @P2 BRA `(.L_x_0) ;
        /*0090*/ EXIT ;
.L_x_3:
        /*00a0*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR15], R0 ;
        /*00b0*/ @!P0 BRA `(.L_x_3) ;
        /*00c0*/ BRA `(.L_x_2) ;
"""
    loop = [line.split()[0] for line in aot.main_loop(sass)]
    assert loop[:4] == ["SYNCS.PHASECHK.TRANS64.TRYWAIT", "@!P0", "UTCQMMA", "@P1"]
    assert len(loop) == 7
