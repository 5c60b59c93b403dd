"""The list that `make contract` prints of a version, from a wheel."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("sglang")

from sglang_modelopt_ext.integration import contract
from sglang_modelopt_ext.integration.uses import Called, Use

TOOL = Path(__file__).resolve().parents[2] / "tools" / "sglang_version.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, with a wheel of three lines in place of a download, and a contract of three rows."""
    spec = importlib.util.spec_from_file_location("sglang_version", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def download(*arguments: str) -> None:
        place = Path(arguments[arguments.index("--dest") + 1])
        assert arguments[-1] == "sglang==9.9"
        with zipfile.ZipFile(place / "sglang-9.9-py3-none-any.whl", "w") as wheel:
            wheel.writestr("sglang/srt/part.py", "def serve(model, port): ...\n")
            wheel.writestr("sglang-9.9.dist-info/METADATA", "Requires-Dist: flashinfer_python[cu13]==0.1\n")

    rows = (Use("part", "a"), Called("part.serve", "b", ("model",)), Use("part.stop", "c"))
    monkeypatch.setattr(module, "pip", download)
    monkeypatch.setattr(module, "all_hooks", lambda: ())
    monkeypatch.setattr(contract, "USES", rows)
    return module


def test_the_differences_of_a_version_are_listed(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["contract", "9.9"]) == 1
    notes, lines = [], []
    for line in capsys.readouterr().out.splitlines():
        (notes if line.startswith("note: ") else lines).append(line)
    assert lines == [
        "part.serve: needs port",
        "part.stop: missing",
        "SGLang 9.9: 2 differences from 3 rows of the contract",
    ]
    assert notes[0].startswith("note: pins 0.1 of flashinfer-python; ")
    assert notes[1].startswith("note: pins no version of humming-kernels; ")


def test_a_version_without_differences_is_zero(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "USES", contract.USES[:1])
    assert tool.main(["contract", "9.9"]) == 0
