"""The demo's own decisions, without ModelOpt and servers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    """Return ``examples/demo.py`` as a module."""
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        spec.loader.exec_module(module)
    return module


def test_nothing_held_out_is_calibrated_on(demo: ModuleType, tmp_path: Path) -> None:
    files = demo.write_calibration(tmp_path)
    heldout = demo.read_heldout(demo.HELDOUT)
    assert len(files) == demo.CALIBRATION_FILES
    assert len(heldout) > 5
    assert not {file.name for file in files} & {f"{document.path.replace('/', '.')}.txt" for document in heldout}
    assert not {file.read_text(encoding="utf-8") for file in files} & {document.text for document in heldout}


@pytest.mark.parametrize("which", ["SHIPPED_MODEL", "SHIPPED_MOE"])
def test_windows_of_the_shipped_models(demo: ModuleType, which: str) -> None:
    folder = getattr(demo, which)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12e6
    plan = demo.make_plan(folder, 512, 12)
    assert len(plan.windows) == 12
    assert all(len(window) <= 513 and window[0] == 0 and 0 not in window[1:] for window in plan.windows)
    assert plan.divergence_positions >= 512, "every position is compared"


def test_bad_model_is_one_line(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL", "not a valid name")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path / "out")])
    monkeypatch.setattr(demo.signal, "signal", lambda number, handler: None)
    assert demo.main() == 1
    assert capsys.readouterr().err.strip().startswith("ModelOptExtError: MODEL: not a valid name: expected a folder")
