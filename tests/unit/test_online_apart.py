"""Quantization at load in a process of its own, as on a GPU: the same result, the same errors, and no process left behind."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sglang_modelopt_ext.checkpoint.tensors import read_headers
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.online import apart
from sglang_modelopt_ext.online.convert import convert
from sglang_modelopt_ext.online.recipe import Recipe
from sglang_modelopt_ext.online.tensors import write_tensors
from tests.support import edits
from tests.support.models import TinyModel, model_dir

MXFP4, NVFP4 = "W4A8_MXFP4_FP8", "W4A8_NVFP4_FP8"
SMALL = TinyModel("llama", hidden=128, intermediate=256, heads=2, kv_heads=1, layers=1)
MODULES = tuple(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))


def recipe_of(algo: str, folder: Path) -> Recipe:
    if algo == MXFP4:
        return Recipe(MXFP4)
    folder.mkdir()
    save_file({f"{name}.input_scale": torch.tensor(0.01) for name in MODULES}, folder / "scales.safetensors")
    return Recipe(NVFP4, math="fp8", input_scales=folder)


def same(first: Path, second: Path) -> None:
    one, other = edits.read_tensors(first), edits.read_tensors(second)
    assert one.keys() == other.keys() >= {f"{name}.weight_scale" for name in MODULES}
    for name, tensor in one.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("algo", [MXFP4, NVFP4])
def test_another_process_writes_the_same(algo: str, tmp_path: Path) -> None:
    source, recipe = model_dir(SMALL), recipe_of(algo, tmp_path / "scales")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    here = write_tensors(source, MODULES, recipe, tmp_path / "here")
    assert apart.write_apart(source, MODULES, recipe, tmp_path / "there", "cpu") == here
    assert here[0] < here[1]
    same(tmp_path / "here", tmp_path / "there")


def test_its_error_is_the_error(tmp_path: Path) -> None:
    spoil = edits.map_tensors("*.up_proj.weight", lambda weight: weight.index_fill(1, torch.tensor(3), torch.nan))
    source = edits.copy_with(model_dir(SMALL), tmp_path / "model", [spoil])
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelOptExtError, match=r"up_proj\.weight: expected finite weights") as raised:
        apart.write_apart(source, MODULES, Recipe(MXFP4), tmp_path / "out", "cpu")
    assert str(raised.value).count("expected") == 1


def test_a_process_that_fails_leaves_it_to_the_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = model_dir(SMALL)
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    here = write_tensors(source, MODULES, Recipe(MXFP4), tmp_path / "here")
    (tmp_path / "there" / "half.safetensors").touch()
    with caplog.at_level(logging.WARNING):
        found = apart.write_apart(source, MODULES, Recipe(MXFP4), tmp_path / "there", "cuda:99")
    assert found == here
    assert "weights are rounded on the CPU, for the process on the GPU ended:" in caplog.text
    same(tmp_path / "here", tmp_path / "there")
    assert not (tmp_path / "there" / "half.safetensors").exists()


def test_it_ends_with_the_process_that_asked(tmp_path: Path) -> None:
    slow = "import sys, time; from sglang_modelopt_ext.online import apart; apart.write_tensors = lambda *given: time.sleep(60)"
    request = {"source": str(tmp_path), "modules": [], "folder": str(tmp_path), "device": "cpu"}
    request |= {"recipe": {"algo": MXFP4, "input_scales": None}}
    command = [sys.executable, "-c", f"{slow}; sys.exit(apart.main())"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(8)
        process.stdin.close()
        assert process.wait(20) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("algo", [MXFP4, "mxfp4"])
def test_on_a_gpu(algo: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("transformers")
    made = [
        convert(model_dir(SMALL), Recipe(algo), tmp_path / name, gpu=gpu).folder
        for name, gpu in (("c", None), ("g", 0))
    ]
    same(*made)
    assert read_headers(made[0]).keys() == read_headers(made[1]).keys()
    assert "rounded on the CPU" not in caplog.text
