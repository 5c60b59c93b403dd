"""The CPU runtime's import shims: where they are not installed, and that the real thing always wins over them.

Their effect on imports is tried in processes of their own, started without site-packages, on packages made for the
test.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CPU_RUNTIME = Path(__file__).resolve().parents[2] / "cpu_runtime"
SHIMS = CPU_RUNTIME / "shims"


def load(path: Path) -> ModuleType:
    """Return the module in a file that is on no import path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def installer() -> ModuleType:
    return load(CPU_RUNTIME / "install_shims.py")


@pytest.fixture(scope="module")
def shims() -> ModuleType:
    return load(SHIMS / "sglang_cpu_runtime.py")


def write(root: Path, files: Mapping[str, str]) -> Path:
    """Write files by relative path under ``root``, and return it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def run_python(code: str, *paths: Path, env: Mapping[str, str] | None = None) -> Any:
    """Run ``code`` in a bare interpreter with ``paths`` in front of sys.path.

    Returns:
        What the code assigned to ``result``, by way of JSON.
    """
    program = f"import sys\nsys.path[:0] = {[str(p) for p in paths]!r}\n{code}\nimport json\nprint(json.dumps(result))"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**environ, **(env or {})},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


ACTIVATE = "import sglang_cpu_runtime\nsglang_cpu_runtime.activate()\n"


class TestInstaller:
    @pytest.mark.parametrize("name", ["sglang_kernel", "sglang-kernel", "sgl_kernel"])
    def test_refuses_next_to_sglangs_kernels(
        self, installer: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        packages = write(tmp_path / "site", {f"{name}-0.4.10.dist-info/METADATA": f"Name: {name}\nVersion: 0.4.10\n"})
        assert installer.main([], site_packages=packages, search_path=[str(packages)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{name.replace('_', '-')} 0.4.10 is installed" in error
        assert not list(packages.glob("sglang_cpu_runtime*"))

    def test_refuses_next_to_a_cuda_build_of_torch(
        self, installer: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        packages = write(
            tmp_path, {"torch/__init__.py": "raise ImportError('imported')", "torch/version.py": "cuda: str = '13.0'\n"}
        )
        assert installer.main([], site_packages=packages, search_path=[str(packages)]) == 1
        assert "torch is a CUDA 13.0 build" in capsys.readouterr().err
        assert not list(packages.glob("sglang_cpu_runtime*"))

    @pytest.mark.parametrize("files", [{}, {"torch/__init__.py": "", "torch/version.py": "cuda = None\n"}])
    def test_accepts_a_cpu_build_of_torch_or_none(
        self, installer: ModuleType, tmp_path: Path, files: dict[str, str]
    ) -> None:
        assert installer.objection([str(write(tmp_path, files))]) is None

    def test_installs_twice_and_uninstalls_without_a_trace(self, installer: ModuleType, tmp_path: Path) -> None:
        for _ in range(2):
            assert installer.main([], site_packages=tmp_path, search_path=[]) == 0
        for name in installer.FILES:
            assert (tmp_path / name).read_bytes() == (SHIMS / name).read_bytes()
        for _ in range(2):
            assert installer.main(["--uninstall"], site_packages=tmp_path) == 0
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


class TestInterpreterStart:
    @pytest.fixture
    def site_packages(self, installer: ModuleType, tmp_path: Path) -> Path:
        installer.install(tmp_path)
        return tmp_path

    def test_activates_and_loads_next_to_nothing(self, site_packages: Path) -> None:
        code = (
            "import site\n"
            "before = set(sys.modules)\n"
            f"site.addsitedir({str(site_packages)!r})\n"
            "result = [sorted(set(sys.modules) - before), [type(f).__name__ for f in sys.meta_path]]\n"
        )
        loaded, finders = run_python(code)
        assert set(loaded) <= {"sglang_cpu_runtime", "__future__", "types"}
        assert finders[0] == "BeforeImport"
        assert finders[-1] == "KernelStandIn"

    def test_is_silent_without_its_module(self, site_packages: Path) -> None:
        (site_packages / "sglang_cpu_runtime.py").unlink()
        (site_packages / "__pycache__").rename(site_packages / "gone")
        code = f"import site\nsite.addsitedir({str(site_packages)!r})\nresult = len(sys.meta_path)\n"
        assert run_python(code) == run_python("result = len(sys.meta_path)")

    def test_activates_once(self) -> None:
        code = ACTIVATE + "n = len(sys.meta_path)\nsglang_cpu_runtime.activate()\nresult = len(sys.meta_path) - n\n"
        assert run_python(code, SHIMS) == 0


class TestKernelStandIn:
    def test_functions_raise_when_called(self, shims: ModuleType) -> None:
        module = shims.StandInModule("sgl_kernel")
        with pytest.raises(NotImplementedError, match=r"sgl_kernel\.fused_add_rmsnorm_cpu needs the real sgl_kernel"):
            module.fused_add_rmsnorm_cpu(1, out=2)

    def test_has_no_dunder_names(self, shims: ModuleType) -> None:
        assert not hasattr(shims.StandInModule("sgl_kernel"), "__version__")

    def test_import_from_works_and_submodules_stay_missing(self) -> None:
        code = ACTIVATE + (
            "from sgl_kernel import a, b\n"
            "import sgl_kernel\n"
            "try:\n"
            "    import sgl_kernel.flash_attn\n"
            "except ModuleNotFoundError as error:\n"
            "    result = [str(error), a is sgl_kernel.a, a is b]\n"
        )
        assert run_python(code, SHIMS) == ["No module named 'sgl_kernel.flash_attn'", True, False]

    def test_a_real_package_wins(self, tmp_path: Path) -> None:
        real = write(tmp_path, {"sgl_kernel/__init__.py": "real = 1\n"})
        assert run_python(ACTIVATE + "import sgl_kernel\nresult = sgl_kernel.real\n", SHIMS, real) == 1

    def test_a_real_package_wins_though_its_finder_comes_later(self, tmp_path: Path) -> None:
        """Editable installs append finders of their own."""
        file = write(tmp_path, {"elsewhere.py": "real = 1\n"}) / "elsewhere.py"
        code = ACTIVATE + (
            "from importlib.util import spec_from_file_location\n"
            "class Later:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        return spec_from_file_location(name, {str(file)!r}) if name == 'sgl_kernel' else None\n"
            "sys.meta_path.append(Later())\n"
            "import sgl_kernel\n"
            "result = sgl_kernel.real\n"
        )
        assert run_python(code, SHIMS) == 1


class TestCpuEngine:
    CODE = ACTIVATE + "import os, sglang\nresult = os.environ.get('SGLANG_USE_CPU_ENGINE')\n"

    @pytest.fixture
    def sglang(self, tmp_path: Path) -> Path:
        return write(tmp_path / "sglang_only", {"sglang/__init__.py": ""})

    def test_is_the_default_once_sglang_is_imported(self, sglang: Path) -> None:
        assert run_python(ACTIVATE + "import os\nresult = 'SGLANG_USE_CPU_ENGINE' in os.environ\n", SHIMS) is False
        assert run_python(self.CODE, SHIMS, sglang) == "1"

    def test_leaves_the_users_choice_alone(self, sglang: Path) -> None:
        assert run_python(self.CODE, SHIMS, sglang, env={"SGLANG_USE_CPU_ENGINE": "0"}) == "0"

    def test_is_not_set_next_to_real_kernels(self, sglang: Path, tmp_path: Path) -> None:
        real = write(tmp_path / "kernels_only", {"sgl_kernel/__init__.py": ""})
        assert run_python(self.CODE, SHIMS, sglang, real) is None


class TestTorchvision:
    FILES: Mapping[str, str] = {
        "torch/__init__.py": "from torch import library\n",
        "torch/library.py": (
            "declared = []\n"
            "class Library:\n"
            "    def __init__(self, namespace, kind):\n"
            "        self.prefix = f'{kind} {namespace}::'\n"
            "    def define(self, schema):\n"
            "        declared.append(self.prefix + schema.split('(')[0])\n"
        ),
        "torchvision/__init__.py": "from torchvision import extension\nfrom torchvision import _meta_registrations\n",
        "torchvision/_meta_registrations.py": "import torch\nseen = list(torch.library.declared)\n",
    }
    CODE = ACTIVATE + "import torchvision\nresult = torchvision._meta_registrations.seen\n"

    @pytest.mark.parametrize(
        ("has_ops", "seen"), [(False, ["DEF torchvision::nms", "DEF torchvision::qnms"]), (True, [])]
    )
    def test_operators_are_declared_where_they_did_not_load(
        self, tmp_path: Path, has_ops: bool, seen: list[str]
    ) -> None:
        extension = f"def _has_ops():\n    return {has_ops}\n"
        packages = write(tmp_path, {**self.FILES, "torchvision/extension.py": extension})
        assert run_python(self.CODE, SHIMS, packages) == seen


def test_sglang_imports_in_this_environment(tmp_path: Path) -> None:
    """The shims work with everything real: SGLang imports."""
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed")
    if importlib.util.find_spec("sglang_cpu_runtime") is None:
        pytest.skip("the CPU runtime is not what this environment has")
    code = (
        "import torchvision, sglang.srt.utils as u, sgl_kernel\n"
        "assert u.is_cpu()\n"
        "assert not u.cpu_has_amx_support()\n"
        "import sglang.srt.managers.scheduler\n"
    )
    environ = {name: value for name, value in os.environ.items() if name != "SGLANG_USE_CPU_ENGINE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
