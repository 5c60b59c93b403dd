"""Every kernel and configuration repeats bit for bit on the GPU at hand: the short form of ``python -m benchmarks.stress``."""

from __future__ import annotations

import pytest
import torch

from benchmarks import stress
from benchmarks.registry import stress_cases
from benchmarks.registry.base import Launch, StressCase
from benchmarks.registry.operands import capability

CASES = list(stress_cases(capability() if torch.cuda.is_available() else 90))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_repeats(case: StressCase) -> None:
    result = stress.stress(case, stress.SHORT)
    assert not result.wrong, result.describe()


def test_every_kernel_has_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    kernels = {case.name.split(" ")[0] for case in CASES}
    assert kernels >= {"block_scaled", "eight_bit", "fp8_linear", "experts", "decode", "extend", "store", "route"}


def launch_on(cuda: torch.device, differ: bool, wrong: bool) -> Launch:
    expected = torch.ones(4, 8, dtype=torch.float64, device=cuda)
    calls = iter(range(1000))
    return Launch(lambda: (expected * (2 if wrong else 1)).float() + (next(calls) == 7) * differ * 2.0**-20, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("differ", "wrong"), [(False, False), (True, False), (False, True)])
def test_a_result_that_differs_or_errs_is_found(differ: bool, wrong: bool) -> None:
    result = stress.stress(StressCase("case", lambda: launch_on(torch.device("cuda"), differ, wrong)), 20)
    assert (result.differing > 0, result.wrong) == (differ, differ or wrong)


def test_what_is_reported() -> None:
    results = [
        stress.Result("block_scaled nvfp4 a", 100, 0, 1e-3, 2.0**-8),
        stress.Result("block_scaled nvfp4 b", 100, 3, 1e-3, 2.0**-8),
        stress.Result("route", failed="RuntimeError: no"),
    ]
    assert [result.wrong for result in results] == [False, True, True]
    assert stress.table(results)[2:] == [
        "| block_scaled nvfp4 | 2 | 200 | 3 | 1 | 1.0e-03 |",
        "| route | 1 | 0 | 0 | 1 | - |",
        "| all | 3 | 200 | 3 | 2 | 1.0e-03 |",
    ]
