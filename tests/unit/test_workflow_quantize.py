"""Quantizing writes a whole, checked checkpoint or leaves everything as it was."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sglang_modelopt_ext.checkpoint.reader import check_all_values, read_checkpoint
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow import quantize as module
from sglang_modelopt_ext.workflow.quantize import main, quantize
from tests.support.models import TinyModel, model_dir

RECIPE = "W4A8_NVFP4_FP8"
TEXTS = ("import os\n\ndef first(path):\n    return os.fspath(path)\n" * 8, "x = [1, 2, 3]\n" * 20)


@pytest.fixture(scope="module")
def model() -> Path:
    """A tiny random Llama with a tokenizer."""
    return model_dir(TinyModel())


def run(model: Path, output: Path, **options: Any) -> module.QuantizedModel:
    """:func:`quantize` without progress, on few tokens."""
    return quantize(model, RECIPE, output, TEXTS, window=32, max_windows=4, device="cpu", progress=False, **options)


def stub_modelopt(monkeypatch: pytest.MonkeyPatch, export: Callable[[Path], None]) -> None:
    """Replaces ModelOpt by ``export(folder)``."""

    def replacement(folder: Path, recipe: str, config: Any, windows: Sequence[Any], scratch: Path, *rest: Any) -> None:
        export(scratch)

    monkeypatch.setattr(module, "find_config", lambda recipe: {})
    monkeypatch.setattr(module, "_run_modelopt", replacement)


def old_checkpoint(folder: Path) -> Path:
    """A folder that looks like an earlier result."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "old").touch()
    return folder


def names(folder: Path) -> set[str]:
    """What is in a folder, hidden leftovers included."""
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("recipe", ["W4A8_NVFP4_FP8", "w4a8_mxfp4_fp8_cfg"])
def test_real_export_is_valid_and_complete(model: Path, tmp_path: Path, recipe: str) -> None:
    done = quantize(model, recipe, tmp_path / "out", TEXTS, window=32, max_windows=4, device="cpu", progress=False)
    checkpoint = read_checkpoint(done.folder)
    check_all_values(checkpoint)
    assert done.algo == checkpoint.config.algo == recipe.upper().removesuffix("_CFG")
    assert done.linears == len(checkpoint.linears) == 14
    assert done.bits_per_weight == pytest.approx(4.25, abs=0.01)
    assert names(tmp_path) == {"out"}
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (done.folder / file).read_bytes() == (model / file).read_bytes()


def test_existing_output_is_refused_untouched(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_modelopt(monkeypatch, lambda folder: pytest.fail("ModelOpt was started"))
    output = old_checkpoint(tmp_path / "out")
    with pytest.raises(ModelOptExtError, match="does not exist, or overwrite"):
        run(model, output)
    assert names(output) == {"config.json", "old"}


def test_overwrite_never_deletes_something_else(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_modelopt(monkeypatch, lambda folder: pytest.fail("ModelOpt was started"))
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ModelOptExtError, match="an old checkpoint to overwrite"):
        run(model, tmp_path, overwrite=True)
    for output in (model, model.parent):
        with pytest.raises(ModelOptExtError, match="another folder than the model's"):
            run(model, output, overwrite=True)
    assert names(tmp_path) == {"thesis.txt"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_failing_export_leaves_what_was_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    def half(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    stub_modelopt(monkeypatch, half)
    output = old_checkpoint(tmp_path / "out") if overwrite else tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(model, output, overwrite=overwrite)
    assert names(tmp_path) == ({"out"} if overwrite else set())
    if overwrite:
        assert names(output) == {"config.json", "old"}


def test_export_the_reader_refuses_is_not_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"quantization": {"quant_algo": RECIPE, "group_size": 32}}
    stub_modelopt(
        monkeypatch, lambda folder: (folder / "hf_quant_config.json").write_text(json.dumps(section)) and None
    )
    with pytest.raises(ModelOptExtError, match="safetensors"):
        run(model, tmp_path / "out")
    assert names(tmp_path) == set()


def test_overwrite_replaces_the_whole_folder(model: Path, tmp_path: Path) -> None:
    output = old_checkpoint(tmp_path / "out")
    run(model, output, overwrite=True)
    assert "old" not in names(output)
    assert names(tmp_path) == {"out"}
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in output.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_missing_modelopt_is_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "modelopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "modelopt", None)
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[0])
    arguments = [str(model), "--recipe", RECIPE, "--text", str(text), "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ModelOptExtError: modelopt: import: expected NVIDIA ModelOpt (pip install")


def test_unknown_recipe_lists_the_known_ones(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelOptExtError, match=r"W3A5: expected one of .*W4A8_NVFP4_FP8_CFG"):
        quantize(model, "W3A5", tmp_path / "out", TEXTS, progress=False)


def test_model_without_weights_is_one_line(model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for file in model.glob("*.json"):
        (empty / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelOptExtError, match="ModelOpt to quantize and export it, got OSError"):
        run(empty, tmp_path / "out")
    assert names(tmp_path) == {"empty"}
