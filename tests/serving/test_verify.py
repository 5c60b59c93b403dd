"""Every export of every recipe, on a real server, passes ``verify`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_modelopt_ext.cli.main import main
from sglang_modelopt_ext.env import MXFP4_ACTIVATIONS
from tests.layers.test_recipes import RECIPES
from tests.support.exports import export
from tests.support.kv_exports import PRESETS, kv_export
from tests.support.models import TinyModel, model_dir

pytestmark = [pytest.mark.server, pytest.mark.full]


def check(capsys: pytest.CaptureFixture[str], folder: Path, *args: str) -> None:
    capsys.readouterr()
    code = main(["verify", str(folder), "--base", str(model_dir(TinyModel("llama"))), "--json", *args])
    found = json.loads(capsys.readouterr().out)["verification"]
    assert (code, found["failures"]) == (0, []), found


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    monkeypatch.setenv(MXFP4_ACTIVATIONS.variable, "mxfp4")
    check(capsys, export(model_dir(TinyModel("llama")), recipe), "--dtype", "float32")


@pytest.mark.parametrize("recipe", PRESETS)
def test_kv_caches(capsys: pytest.CaptureFixture[str], recipe: str) -> None:
    flag = ("--kv-cache-dtype", "modelopt_nvfp4_rotate") if recipe == "nvfp4_rotate" else ()
    check(capsys, kv_export(recipe, "llama", "W4A8_NVFP4_FP8_CFG"), *flag)
