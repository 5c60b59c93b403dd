"""Imports of ``tests.support`` and ``benchmarks`` without the root on sys.path, failures named at once, cases in one order.

The root (and tests/) would make their folders named ``kernels`` importable as a package of that name, which is a Hugging Face
package that SGLang and transformers look for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

for name in ("tests", "benchmarks"):
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(Path(__file__).parent / name)]
        sys.modules[name] = package


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Refuse cases from a set: their order differs between processes, and pytest-xdist then runs nothing at all."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        names, values = (*mark.args, *(mark.kwargs.get(key) for key in ("argnames", "argvalues")))[:2]
        if isinstance(values, (set, frozenset)):
            raise pytest.UsageError(f"{metafunc.definition.nodeid}: cases of {names} are a set, expected a sequence")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print the name of a failed test as it fails: a run that is stopped prints no summary."""
    if report.failed:
        print(f"\nFAILED {report.nodeid} ({report.when})", file=sys.stderr, flush=True)
