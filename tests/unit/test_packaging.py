"""The content of the wheel, and the import path of the editable install of ``make setup``."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("sglang_modelopt_ext", "sglang_modelopt_kernels")
SOURCES = ("sglang_modelopt_ext", "kernels/sglang_modelopt_kernels")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built from a copy: setuptools would reuse a build/ left in the tree, and leave one."""
    pytest.importorskip("setuptools", minversion="77.0.3")
    tree = tmp_path_factory.mktemp("tree") / "project"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.safetensors")
    shutil.copytree(ROOT, tree, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(tree))
    (path,) = out.glob("*.whl")
    return path


def pip(*args: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_python(code: str, cwd: Path, *paths: Path) -> Any:
    """Run ``code`` with ``paths`` in front of sys.path, isolated from this process's own; return its ``result``."""
    program = f"import sys\nsys.path[:0] = {[str(p) for p in paths]!r}\n{code}\nimport json\nprint(json.dumps(result))"
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def python_files(folder: Path) -> set[str]:
    """Return the modules under ``folder``, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*.py")}


class TestWheel:
    def test_holds_the_two_packages_and_nothing_else(self, wheel: Path) -> None:
        names = zipfile.ZipFile(wheel).namelist()
        top = {name.split("/")[0] for name in names}
        assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)

    @pytest.mark.parametrize(("package", "source"), list(zip(PACKAGES, SOURCES, strict=True)))
    def test_holds_every_module(self, wheel: Path, package: str, source: str, tmp_path: Path) -> None:
        zipfile.ZipFile(wheel).extractall(tmp_path)
        assert python_files(tmp_path / package) == python_files(ROOT / source)
        assert (tmp_path / package / "py.typed").exists()

    def test_metadata(self, wheel: Path, pyproject: dict[str, Any], tmp_path: Path) -> None:
        zipfile.ZipFile(wheel).extractall(tmp_path)
        (info,) = tmp_path.glob("*.dist-info")
        version = re.search(r'__version__ = "(.+)"', (ROOT / "sglang_modelopt_ext/_version.py").read_text())
        assert version is not None
        metadata = (info / "METADATA").read_text()
        assert f"\nVersion: {version.group(1)}\n" in metadata
        assert "\nLicense-Expression: Apache-2.0\n" in metadata
        assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
        assert not {requirement_name(line) for line in pyproject["project"]["dependencies"]} & {"sglang", "torch"}
        assert (info / "entry_points.txt").read_text().split() == [
            "[console_scripts]",
            "sglang-modelopt",
            "=",
            "sglang_modelopt_ext.cli.main:main",
            "[sglang.srt.plugins]",
            "modelopt_ext",
            "=",
            "sglang_modelopt_ext.integration.plugin:register",
        ]

    def test_both_packages_import_from_an_installed_wheel(self, wheel: Path, tmp_path: Path) -> None:
        site = tmp_path / "site"
        pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
        code = f"import importlib\nresult = [importlib.import_module(name).__file__ for name in {PACKAGES!r}]\n"
        assert run_python(code, tmp_path, site) == [str(site / name / "__init__.py") for name in PACKAGES]


class TestEditableInstall:
    """Of ``.venv``, from a directory that is not the repository."""

    @pytest.fixture(autouse=True)
    def _in_the_venv(self) -> None:
        if Path(sys.prefix) != ROOT / ".venv":
            pytest.skip("not run from .venv")

    def test_packages_come_from_the_repository(self, tmp_path: Path) -> None:
        code = f"import importlib\nresult = [importlib.import_module(name).__file__ for name in {PACKAGES!r}]\n"
        assert run_python(code, tmp_path) == [str(ROOT / source / "__init__.py") for source in SOURCES]

    def test_nothing_else_does(self, tmp_path: Path) -> None:
        code = (
            "from importlib.util import find_spec\n"
            "names = 'kernels', 'tests', 'benchmarks', 'examples', 'cpu_runtime', 'tools'\n"
            "specs = [find_spec(name) for name in names]\n"
            "result = [str(p) for spec in specs if spec for p in spec.submodule_search_locations or [spec.origin]]\n"
        )
        sources = [path for path in run_python(code, tmp_path) if Path(path).is_relative_to(ROOT)]
        assert [path for path in sources if not Path(path).is_relative_to(ROOT / ".venv")] == []

    def test_the_plugin_is_found_once(self, tmp_path: Path) -> None:
        code = (
            "from importlib.metadata import entry_points\n"
            "result = [e.value for e in entry_points(group='sglang.srt.plugins') if e.name == 'modelopt_ext']\n"
        )
        assert run_python(code, tmp_path) == ["sglang_modelopt_ext.integration.plugin:register"]


def test_the_kernels_folder_never_shadows_the_hugging_face_package(tmp_path: Path) -> None:
    """Even with the repository in front on sys.path, as under ``python -m``: a folder without __init__.py yields."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    found = run_python("import kernels\nresult = kernels.__file__\n", tmp_path, ROOT, tmp_path)
    assert found == str(package / "__init__.py")


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """Return the CPU runtime's versions by name."""
    pins = {}
    for name in ("requirements.txt", "requirements-no-deps.txt"):
        for line in (ROOT / "cpu_runtime" / name).read_text().splitlines():
            if line and not line.startswith("#"):
                package, version = line.split("==")
                assert package not in pins, f"{package} is pinned twice"
                pins[package] = version
    return pins


class TestDependencies:
    def test_every_import_is_declared(self, pyproject: dict[str, Any]) -> None:
        """Imports at module level by `dependencies`, others by an extra. What SGLang brings is left out on purpose."""
        project = pyproject["project"]
        base = {requirement_name(line) for line in project["dependencies"]}
        extras = project["optional-dependencies"]
        extra = {requirement_name(line) for line in (*extras["quantize"], *extras["evaluate"])}
        undeclared = []
        for source in SOURCES:
            for path in (ROOT / source).rglob("*.py"):
                for name, at_top in imports(path):
                    distribution = {"modelopt": "nvidia-modelopt", "yaml": "pyyaml"}.get(name, name.replace("_", "-"))
                    if distribution not in (base if at_top else base | extra):
                        undeclared.append(f"{path.relative_to(ROOT)}: {name}")
        assert undeclared == []

    def test_the_extras_agree_with_the_cpu_runtime(self, pins: dict[str, str], pyproject: dict[str, Any]) -> None:
        extras: dict[str, list[str]] = pyproject["project"]["optional-dependencies"]
        exact = [line for extra in extras.values() for line in extra if "==" in line]
        assert exact
        assert {line: f"{requirement_name(line)}=={pins[requirement_name(line)]}" for line in exact} == {
            line: line for line in exact
        }

    def test_the_cpu_runtime_has_every_dependency(self, pins: dict[str, str], pyproject: dict[str, Any]) -> None:
        project = pyproject["project"]
        lines: Iterable[str] = sum(project["optional-dependencies"].values(), project["dependencies"])
        # lm-eval brings forty packages for tasks that few will run.
        assert {requirement_name(line) for line in lines} - {"lm-eval"} <= pins.keys()


BROUGHT_BY_SGLANG = {"flashinfer", "humming", "prometheus_client", "quack", "sgl_kernel", "sglang", "torch", "triton"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the third-party packages a module imports, and whether at its top level."""
    tree = ast.parse(path.read_text())
    ours = {*sys.stdlib_module_names, *PACKAGES, *BROUGHT_BY_SGLANG}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in names:
            if (top := name.split(".")[0]) not in ours:
                yield top, node in tree.body


def requirement_name(line: str) -> str:
    """Return the normalized name in a requirement."""
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[; ]", line)[0]).lower()
