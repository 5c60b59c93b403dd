"""Quantization of a tiny model on few tokens, and the content of the resulting folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_modelopt_ext.workflow.quantize import run as module
from sglang_modelopt_ext.workflow.quantize.run import Options, Quantized, quantize
from tests.support.models import TinyModel, random_ids

RECIPE = "W4A8_NVFP4_FP8"
SMALL = TinyModel(dtype="float32", hidden=128, intermediate=256, heads=2, kv_heads=1)
TEXTS = ("import os\n\ndef first(path):\n    return os.fspath(path)\n" * 8, "x = [1, 2, 3]\n" * 20)
IDS = tuple(random_ids(32, seed=70 + i, vocab=511) for i in range(4))


def calibration_file(folder: Path) -> str:
    """Write :data:`TEXTS` to a file in ``folder`` and return its path."""
    file = folder / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return str(file)


def run(model: Path, output: Path, data: str, recipe: str = RECIPE, **options: Any) -> Quantized:
    """Run :func:`quantize` without progress, on few tokens."""
    overwrite = options.pop("overwrite", False)
    options = {"device": "cpu"} | options
    chosen = Options(recipe=recipe, data=(data,), samples=4, sequence_length=32, **options)
    done = quantize(str(model), output, chosen, overwrite=overwrite, progress=False)
    assert done is not None
    return done


def names(folder: Path) -> set[str]:
    """Return the names of all files in a folder, hidden ones included."""
    return {file.name for file in folder.iterdir()}


def old_checkpoint(folder: Path) -> Path:
    """Return a folder that looks like an earlier result."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "old").touch()
    return folder


def not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when a model is loaded."""
    monkeypatch.setattr(module, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
