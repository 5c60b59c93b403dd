"""Bad input to ``quantize`` raises an error that names it, and changes no file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_modelopt_ext.checkpoint.reader import check_all_values, read_checkpoint
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.files.whole import check_space, partial_folder
from sglang_modelopt_ext.workflow.quantize import export as export_module
from sglang_modelopt_ext.workflow.quantize.run import Options, quantize
from tests.support.models import model_dir
from tests.support.quantizing import SMALL, calibration_file, names, not_started, old_checkpoint, run


@pytest.fixture(scope="module")
def model() -> Path:
    """Return a tiny random Llama with a tokenizer."""
    return model_dir(SMALL)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a file of calibration text."""
    return calibration_file(tmp_path_factory.mktemp("data"))


class TestBadInput:
    """Errors that name the input and leave no file behind."""

    def test_existing_output_is_refused_untouched(
        self, model: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        not_started(monkeypatch)
        output = old_checkpoint(tmp_path / "out")
        with pytest.raises(ModelOptExtError, match="expected an empty folder, a new one or --overwrite"):
            run(model, output, data)
        assert names(output) == {"config.json", "old"}

    def test_overwrite_never_deletes_something_else(
        self, model: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        not_started(monkeypatch)
        (tmp_path / "thesis.txt").touch()
        with pytest.raises(ModelOptExtError, match="an old checkpoint to overwrite"):
            run(model, tmp_path, data, overwrite=True)
        for output in (model, model.parent):
            with pytest.raises(ModelOptExtError, match="another folder than the model's"):
                run(model, output, data, overwrite=True)
        assert names(tmp_path) == {"thesis.txt"}

    def test_overwrite_replaces_the_whole_folder(self, model: Path, data: str, tmp_path: Path) -> None:
        output = old_checkpoint(tmp_path / "out")
        run(model, output, data, overwrite=True)
        assert "old" not in names(output)
        assert names(tmp_path) == {"out"}
        check_all_values(read_checkpoint(output))

    def test_an_empty_folder_is_filled(self, model: Path, data: str, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        run(model, tmp_path / "out", data, "fp8")
        read_checkpoint(tmp_path / "out")
        assert names(tmp_path) == {"out"}

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_interrupted_export_leaves_what_was_there(
        self, model: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
    ) -> None:
        def half(folder: Path, *args: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(export_module, "copy_tokenizer", half)
        output = old_checkpoint(tmp_path / "out") if overwrite else tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            run(model, output, data, overwrite=overwrite, layerwise=False)
        assert names(tmp_path) == ({"out"} if overwrite else set())
        if overwrite:
            assert names(output) == {"config.json", "old"}

    def test_export_the_reader_refuses_is_not_kept(
        self, model: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = export_module.copy_tokenizer

        def spoil(source: Path, folder: Path) -> None:
            plain(source, folder)
            tensors = load_file(folder / "model.safetensors")
            tensors["model.layers.0.mlp.up_proj.weight_scale_2"].fill_(float("nan"))
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})

        monkeypatch.setattr(export_module, "copy_tokenizer", spoil)
        with pytest.raises(ModelOptExtError, match=r"up_proj\.weight_scale_2: expected finite"):
            run(model, tmp_path / "out", data, layerwise=False)
        assert names(tmp_path) == set()

    def test_no_space(self, model: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage(tmp_path)
        with pytest.raises(ModelOptExtError, match=r"space on disk: expected .* MB free, got .* MB"):
            check_space(tmp_path / "a" / "b", usage.free * 2)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100_000))
        with pytest.raises(ModelOptExtError, match=r"space on disk: expected 0\.\d MB free, got 0\.1 MB"):
            run(model, tmp_path / "out", data)
        assert names(tmp_path) == set()

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_disk_that_fills_up(
        self, model: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A real ENOSPC in the middle of writing."""

        def full(source: Path, folder: Path) -> None:
            with Path("/dev/full").open("wb", buffering=0) as stream:
                stream.write(b"1")

        monkeypatch.setattr(export_module, "copy_tokenizer", full)
        with pytest.raises(ModelOptExtError, match="space on disk: expected room for the checkpoint"):
            run(model, tmp_path / "out", data, "fp8", layerwise=False)
        assert names(tmp_path) == set()

    @pytest.mark.parametrize(
        ("recipe", "message"),
        [
            ("nvpf4", r"--recipe: nvpf4: expected a known name, such as nvfp4"),
            ("W4A8_NVFP4_FP9", "such as w4a8_nvfp4_fp8"),
            ("general/auto_quantize/nvfp4_fp8_at_5p4bits", "run sglang-modelopt auto-quantize MODEL --recipe general/"),
            ("missing.yaml", "or a recipe file, got no such file"),
            ("nvfp4_experts_only", "expected layers or a KV cache in this model"),
        ],
    )
    def test_recipe(self, model: Path, data: str, tmp_path: Path, recipe: str, message: str) -> None:
        with pytest.raises(ModelOptExtError, match=message):
            run(model, tmp_path / "out", data, recipe)
        assert names(tmp_path) == set()

    def test_data_is_asked_for_where_it_is_needed(self, model: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelOptExtError, match="--data: expected calibration data for fp8, got none"):
            quantize(str(model), tmp_path / "out", Options(recipe="fp8", device="cpu"), progress=False)
        done = quantize(str(model), tmp_path / "out", Options(recipe="mxfp4", device="cpu"), progress=False)
        assert done is not None
        assert done.exported.record.calibration is None

    @pytest.mark.parametrize("pickled", [False, True])
    def test_model_without_safetensors(self, model: Path, data: str, tmp_path: Path, pickled: bool) -> None:
        """Pickled weights are as good as none."""
        copy = tmp_path / "model"
        shutil.copytree(model, copy, ignore=shutil.ignore_patterns("*.safetensors"))
        if pickled:
            torch.save(load_file(model / "model.safetensors"), copy / "pytorch_model.bin")
        with pytest.raises(ModelOptExtError, match="expected at least one safetensors file, got none"):
            run(copy, tmp_path / "out", data)
        assert names(tmp_path) == {"model"}

    def test_quantized_model(self, model: Path, data: str, tmp_path: Path) -> None:
        run(model, tmp_path / "once", data, "fp8")
        with pytest.raises(ModelOptExtError, match="expected an unquantized model, got a quantized one"):
            run(tmp_path / "once", tmp_path / "twice", data)

    def test_nan_weight(self, model: Path, data: str, tmp_path: Path) -> None:
        broken = edited(model, tmp_path / "model", {"model.layers.1.mlp.up_proj.weight": float("nan")})
        with pytest.raises(ModelOptExtError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: expected finite weights"):
            run(broken, tmp_path / "out", data)

    @pytest.mark.parametrize("layerwise", [False, True])
    def test_activations_that_overflow(self, model: Path, data: str, tmp_path: Path, layerwise: bool) -> None:
        """Finite weights whose products are not: the layer they come from is named."""
        broken = edited(model, tmp_path / "model", {"model.layers.1.mlp.up_proj.weight": 3e38})
        with pytest.raises(ModelOptExtError, match=r"model\.layers\.1\.mlp\.up_proj: output: expected finite"):
            run(broken, tmp_path / "out", data, "fp8", layerwise=layerwise)

    def test_custom_code_is_not_run(self, model: Path, data: str, tmp_path: Path) -> None:
        copy = tmp_path / "model"
        shutil.copytree(model, copy)
        (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
        config = json.loads((copy / "config.json").read_text())
        config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelOptExtError, match=r"tokenizer|one that transformers can load"):
            run(copy, tmp_path / "out", data)
        assert names(tmp_path) == {"model"}


def edited(model: Path, target: Path, values: dict[str, float]) -> Path:
    """Return a copy of the model with one entry of some weights (NaN), or all of them (other values), replaced."""
    shutil.copytree(model, target)
    tensors = load_file(model / "model.safetensors")
    for name, value in values.items():
        part = tensors[name] if value == value else tensors[name][:1, :1]
        part.fill_(value)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_what_a_killed_run_left_is_removed(model: Path, data: str, tmp_path: Path) -> None:
    """SIGKILL leaves the temporary folder; the lock of its process is gone, so the next run for the same output clears it."""
    code = (
        "import os, signal\nfrom pathlib import Path\n"
        "from sglang_modelopt_ext.files.whole import partial_folder\n"
        f"with partial_folder(Path({str(tmp_path / 'out')!r})) as folder:\n"
        "    (folder / 'half').touch()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    with partial_folder(tmp_path / "out") as mine:
        assert names(tmp_path) == {mine.name}
        with partial_folder(tmp_path / "out") as other:
            assert names(tmp_path) == {mine.name, other.name}, "a folder in use stays"
    assert names(tmp_path) == set()
