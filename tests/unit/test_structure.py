"""The structure of the two packages: which folder imports which, that none imports in a circle, and the size of files."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXT, KERNELS = "sglang_modelopt_ext", "sglang_modelopt_kernels"
PACKAGES = {EXT: ROOT / EXT, KERNELS: ROOT / "kernels" / KERNELS}
BASE = {EXT, f"{EXT}._version", f"{EXT}.device", f"{EXT}.env", f"{EXT}.errors", f"{EXT}.ports"}
"""Modules that every folder of the plugin may import, and that import nothing but each other."""
DIRECTIONS = {
    "kernels/formats": "",
    "kernels/early": "",
    "kernels/quantize": "kernels/early kernels/formats",
    "kernels/gemm": "kernels/early kernels/formats",
    "kernels/moe": "kernels/early kernels/formats kernels/gemm",
    "kernels/attention": "kernels/formats kernels/gemm kernels/quantize",
    "kernels/timing": "",
    "schemes": "kernels/formats",
    "checkpoint": "kernels/formats schemes",
    "files": "",
    "online": "checkpoint files kernels/formats schemes",
    "backends": "kernels/formats kernels/gemm kernels/moe kernels/quantize schemes",
    "layers": "backends checkpoint kernels/formats kernels/moe kernels/quantize schemes",
    "integration": "backends checkpoint kernels/attention kernels/formats kernels/moe layers online schemes",
    "tuning": "backends checkpoint kernels/formats kernels/gemm kernels/timing layers schemes",
    "workflow/common": "checkpoint kernels/formats",
    "workflow/server": "checkpoint workflow/common",
    "workflow/evaluate": "checkpoint workflow/common workflow/server",
    "workflow/quantize": "checkpoint files kernels/formats schemes workflow/common",
    "workflow/autoquant": "backends checkpoint files kernels/formats schemes workflow/common workflow/quantize",
    "workflow/inspect": "backends checkpoint kernels/formats schemes workflow/common",
    "workflow/verify": "backends checkpoint schemes"
    " workflow/common workflow/evaluate workflow/quantize workflow/server",
    "workflow/repair": "checkpoint files kernels/formats schemes workflow/quantize",
    "workflow/bench": "checkpoint kernels kernels/formats schemes workflow/server",
    "workflow/serve": "checkpoint files workflow/common workflow/quantize workflow/server",
    "cli": "backends checkpoint files tuning workflow/autoquant workflow/bench workflow/common workflow/evaluate"
    " workflow/inspect workflow/quantize workflow/repair workflow/serve workflow/server workflow/verify",
}
"""By folder: the others it imports. A folder that is not named here may import none, and none may import it."""
LINES = 500
LONGER: dict[str, str] = {}
"""Files of at least ``LINES`` lines, with the reason."""


def modules() -> dict[str, Path]:
    """Return the files of both packages by the name they are imported by."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


MODULES = modules()


def imports(source: str, package: str) -> Iterator[tuple[str, str | None]]:
    """Yield every import of ``source``, in functions and under TYPE_CHECKING too: the module, and the name taken from it.

    Args:
        source: a file's text.
        package: the package that relative imports start from.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            yield from ((".".join([*parents, *filter(None, [node.module])]), alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            yield from ((str(a.value), None) for a in node.args[:1] if isinstance(a, ast.Constant))


def imported(module: str) -> set[str]:
    """Return the modules that one of ours imports: of both packages by full name, others as they are written."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for name, attribute in imports(path.read_text(encoding="utf-8"), package):
        submodule = f"{name}.{attribute}"
        found.add(submodule if submodule in MODULES else name)
    return found - {module}


GRAPH = {module: imported(module) for module in MODULES}


def folder_of(module: str) -> str:
    """Return the row of ``DIRECTIONS`` that a module is in."""
    package, *rest = module.split(".")
    if package == KERNELS:
        return f"kernels/{rest[0]}" if rest else "kernels"
    return "/".join(rest[:2] if rest[:1] == ["workflow"] else rest[:1])


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("import a.b", ("a.b", None)),
        ("def f():\n    from a import b", ("a", "b")),
        ("if TYPE_CHECKING:\n    from a.b import c", ("a.b", "c")),
        ("from . import c", ("p.q", "c")),
        ("from ..b import c", ("p.b", "c")),
        ("importlib.import_module('a.b')", ("a.b", None)),
    ],
)
def test_every_import_is_found(statement: str, found: tuple[str, str | None]) -> None:
    assert list(imports(statement, "p.q")) == [found]


def test_only_the_integration_imports_sglang() -> None:
    importing = {module for module, names in GRAPH.items() if any(name.split(".")[0] == "sglang" for name in names)}
    assert importing
    assert {folder_of(module) for module in importing} == {"integration"}


def test_kernels_need_torch_and_triton_only() -> None:
    needed = {name.split(".")[0] for module in MODULES if module.startswith(KERNELS) for name in GRAPH[module]}
    assert needed - sys.stdlib_module_names == {KERNELS, "torch", "triton"}


def test_no_import_goes_in_a_circle() -> None:
    try:
        TopologicalSorter({module: names & MODULES.keys() for module, names in GRAPH.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_folders_import_in_the_directions_of_the_table() -> None:
    found: dict[str, set[str]] = {}
    for module, names in GRAPH.items():
        own = names & MODULES.keys()
        if module in BASE:
            assert own <= BASE, module
            continue
        others = {folder_of(name) for name in own - BASE} - {folder_of(module)}
        found[folder_of(module)] = found.get(folder_of(module), set()) | others
    TopologicalSorter({folder: names.split() for folder, names in DIRECTIONS.items()}).prepare()
    empty = {"kernels", "workflow"}  # packages that hold folders
    assert {folder: names for folder, names in found.items() if names or folder not in empty} == {
        folder: set(names.split()) for folder, names in DIRECTIONS.items()
    }


def test_files_are_short() -> None:
    folders = ("sglang_modelopt_ext", "kernels", "tests", "benchmarks", "tools", "examples", "cpu_runtime")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > len(MODULES)
    long = {
        str(path.relative_to(ROOT)) for path in paths if len(path.read_text(encoding="utf-8").splitlines()) >= LINES
    }
    assert long == LONGER.keys()
