"""The registry of kernels: a row for every kernel folder, with a naive twin, compilations and launches or the reason why not."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from triton.runtime.jit import KernelInterface

from benchmarks import registry
from benchmarks.attention import RECIPES
from benchmarks.registry.base import Kernel, Product, _nothing
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES

PACKAGE = "sglang_modelopt_kernels"
FOLDER = Path(__file__).resolve().parents[2] / "kernels" / PACKAGE
ROWS = {kernel.folder: kernel for kernel in registry.KERNELS}
LIBRARY = {"gemm/fp8"}
"""Folders with a row and without a ``kernel.py``: they launch kernels of torch."""
EACH_ROW = pytest.mark.parametrize("kernel", registry.KERNELS, ids=lambda kernel: kernel.folder)


def module(folder: str, name: str = "") -> ModuleType:
    return importlib.import_module(".".join((PACKAGE, *folder.split("/"), *([name] if name else []))))


def launched(folder: str) -> set[str]:
    """Names of the kernels of a folder: its functions of Triton that are launched, by their names."""
    found = vars(module(folder, "kernel"))
    own = f"{PACKAGE}.{folder.replace('/', '.')}.kernel"
    return {
        name
        for name, value in found.items()
        if isinstance(value, KernelInterface) and value.fn.__module__ == own and name.endswith("_kernel")
    }


def test_every_kernel_folder_has_one_row() -> None:
    folders = {path.parent.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("kernel.py")}
    assert folders | LIBRARY == ROWS.keys(), "add a row to benchmarks/registry for each kernel.py"
    assert len(ROWS) == len(registry.KERNELS)
    assert max(Counter(kernel.name for kernel in registry.KERNELS).values()) == 1


@EACH_ROW
def test_the_naive_twin_is_beside_the_kernel_or_named_there(kernel: Kernel) -> None:
    """In the folder's own ``naive.py``, or named by the docstring of the folder that uses that of another one."""
    own = f"{PACKAGE}.{kernel.folder.replace('/', '.')}.naive"
    assert inspect.isfunction(kernel.naive)
    assert kernel.naive.__module__ == own or kernel.naive.__name__ in (module(kernel.folder).__doc__ or "")


@EACH_ROW
def test_nothing_is_left_out_without_a_reason(kernel: Kernel) -> None:
    missing = {name for name in ("compile", "stress") if getattr(kernel, name) is _nothing}
    assert missing == kernel.without.keys()
    assert all(len(reason) > 20 for reason in kernel.without.values())


@EACH_ROW
def test_every_kernel_of_a_folder_is_compiled(kernel: Kernel) -> None:
    """Each kernel on some architecture of its row, none on others, and no kernel of another folder."""
    compiled: set[str] = set()
    for arch in kernel.architectures:
        cases = list(kernel.compile(arch))
        assert bool(cases) == ("compile" not in kernel.without)
        compiled |= {case.kernel.fn.__name__ for case in cases}
    assert compiled == (set() if kernel.folder in LIBRARY else launched(kernel.folder))
    assert set(kernel.architectures) <= set(registry.ARCHITECTURES)


@pytest.mark.parametrize("capability", registry.ARCHITECTURES)
def test_names_are_unique(capability: int) -> None:
    for names in (
        [case.name for case in registry.compile_cases(capability)],
        [case.name for case in registry.stress_cases(capability)],
    ):
        assert len(set(names)) == len(names) > 200


def test_formats_and_tile_candidates_are_found_by_name() -> None:
    names = [(type(format_), name) for kernel in registry.KERNELS for name, format_ in kernel.measured.items()]
    assert max(Counter(names).values()) == 1
    products = registry.measured(Product)
    candidates = registry.tile_candidates()
    assert len(candidates) == sum(len(kernel.tiles) for kernel in registry.KERNELS)
    assert {tiled.product for tiled in candidates.values()} <= products.keys()
    assert RECIPES == KV_RECIPES
