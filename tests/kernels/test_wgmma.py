"""No wgmma reads a register that the next iteration has overwritten: the rule, and what every configuration compiles to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import triton

from benchmarks import aot
from benchmarks.registry.base import Case
from benchmarks.sass import register_races
from sglang_modelopt_kernels.gemm.common.wgmma import checked, register_race
from tests.support import racing

PRODUCT = "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%f1,%f2}, {%r1,%r2,%r3,%r4}, %rd1, %p1, 1, 1, 0;"
FROM_MEMORY = "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%f1,%f2}, %rd2, %rd1, %p1, 1, 1, 0, 0;"
COMMIT = "wgmma.commit_group.sync.aligned;"


def loop(*statements: str) -> str:
    lines = "\n".join(f"\t{statement}" for statement in statements)
    return f".entry kernel()\n{{\n$L__BB0_1:   // head\n{lines}\n\t@%p2 bra \t$L__BB0_1;\n$L__BB0_2:\n\tret;\n}}"


def wait(pending: int) -> str:
    return f"wgmma.wait_group.sync.aligned {pending};"


@pytest.mark.parametrize(
    "body",
    [
        (PRODUCT, COMMIT, wait(1), PRODUCT, COMMIT, wait(1)),
        (PRODUCT, COMMIT, wait(0), PRODUCT, COMMIT, wait(1)),
        (PRODUCT, COMMIT),
        (wait(1), PRODUCT, COMMIT, PRODUCT, COMMIT, wait(2)),
        (FROM_MEMORY, COMMIT, PRODUCT, COMMIT, wait(1)),
    ],
)
def test_a_product_in_flight_over_the_edge(body: tuple[str, ...]) -> None:
    """Triton's two products of a step, the second of which the next iteration does not wait for before its first, and the like."""
    assert "loop $L__BB0_1" in (register_race(loop(*body)) or "")


@pytest.mark.parametrize(
    "body",
    [
        (PRODUCT, COMMIT, wait(1), PRODUCT, COMMIT, wait(0)),
        (wait(0), PRODUCT, COMMIT, wait(1), PRODUCT, COMMIT, wait(1)),
        (FROM_MEMORY, COMMIT, wait(1)),
        (PRODUCT, COMMIT, FROM_MEMORY, COMMIT, wait(1)),
        ("// " + PRODUCT, FROM_MEMORY, COMMIT, wait(1)),
    ],
)
def test_what_waits_or_reads_memory(body: tuple[str, ...]) -> None:
    assert register_race(loop(*body)) is None


def test_a_racing_kernel_is_refused_at_its_launch() -> None:
    racing = SimpleNamespace(name="kernel", hash="racing", asm={"ptx": loop(PRODUCT, COMMIT, wait(1))})
    for _ in range(2):
        with pytest.raises(ValueError, match="kernel was compiled to a race: loop"):
            checked(racing)
    checked(SimpleNamespace(name="kernel", hash="sound", asm={"ptx": loop(PRODUCT, COMMIT, wait(0))}))
    checked(None)  # the interpreter's


def test_overwritten_registers_in_machine_code() -> None:
    sass = """
.L_x_1:
        /*0010*/ LDSM.16.M88.4 R156, [R239+UR4+0x30000] ;
        /*0020*/ HGMMA.64x256x16.F32 R24, R160, gdesc[UR16], R24 ;
        /*0030*/ HGMMA.64x256x16.F32 R24, R156, gdesc[UR16], R24, gsb0 ;
        /*0040*/ WARPGROUP.DEPBAR.LE gsb0, {left} ;
        /*0050*/ STS [R157], R2 ;
        /*0060*/ @P0 BRA `(.L_x_1) ;
"""
    assert register_races(sass.replace("{left}", "0x1")) == ["LDSM.16.M88.4 R156, [R239+UR4+0x30000]"]
    assert register_races(sass.replace("{left}", "0x0")) == []


DECODING = ("block_scaled", "folded", "eight_bit", "grouped", "extend")
"""Kernels that compute a left operand."""
FAST = tuple(f"block_scaled e2m1_{kind} fp8e4nv" for kind in ("e4m3/16", "e4m3/32", "exponent/32"))


def cases(wanted: Callable[[str], bool]) -> list[Any]:
    every = [case for case in aot.cases(90) if case.name.startswith(DECODING) and case.matrix]
    return [pytest.param(case, id=case.name) for case in every if wanted(case.name)]


@pytest.mark.parametrize("case", cases(lambda name: name.startswith(FAST)))
def test_every_configuration_that_decodes_fp4(case: Case) -> None:
    assert aot.compile_case(case, 90).problems == []


@pytest.mark.full
@pytest.mark.parametrize("case", cases(lambda name: not name.startswith(FAST)))
def test_every_other_configuration(case: Case) -> None:
    assert aot.compile_case(case, 90).problems == []


@pytest.mark.parametrize(
    "name", ["block_scaled e2m1_e4m3/32 fp8e4nv 128x256x128w8s3", "grouped int8/0 bf16 64x64x128w4s2"]
)
def test_the_race_put_back_is_found(name: str) -> None:
    """The configuration that raced, and one of the experts, without the wait."""
    case = next(case for case in aot.cases(90) if case.name == name)
    racing = dataclasses.replace(case, constexprs=case.constexprs | {"WGMMA": False})
    overwritten, broken = aot.compile_case(racing, 90).problems
    assert "instructions write registers that a wgmma in flight reads" in overwritten
    assert "a wgmma may read registers" in broken


@pytest.mark.parametrize("waits", [False, True])
def test_the_kernel_that_raced(waits: bool) -> None:
    """The copy that the check before serving is tested with overwrites registers still, and does not with a wait."""
    types = {"x_ptr": "*fp16", "w_ptr": "*i16", "s_ptr": "*u8", "row_scale_ptr": "*fp32", "out_scale_ptr": "*fp32"}
    types |= {"y_ptr": "*bf16", "m": "i32", "n": "i32", "k": "i32"}
    constexprs = racing.CONSTEXPRS | {"WAIT": waits, "ASM": True}
    case = Case("racing", racing.racing_kernel, types, constexprs, racing.OPTIONS, ("n", "k"), "any")
    problems = aot.compile_case(case, 90).problems
    if waits:
        assert problems == []
        return
    overwritten, broken = problems
    assert "a wgmma may read registers" in broken
    count = int(overwritten.removesuffix(" instructions write registers that a wgmma in flight reads"))
    # 109 with those whose text repeats, as in the report of the race.
    assert count == 102 if triton.__version__.startswith("3.8.") else count > 0
