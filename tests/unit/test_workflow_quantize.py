"""Quantizing writes a whole, checked, complete checkpoint or leaves everything as it was. ModelOpt is the real one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_modelopt_ext.checkpoint.kv_cache import read_plan
from sglang_modelopt_ext.checkpoint.quant_config import OWN_KEY, read_quant_config
from sglang_modelopt_ext.checkpoint.reader import check_all_values, read_checkpoint
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common import modelopt_cpu
from sglang_modelopt_ext.workflow.quantize import export as export_module
from sglang_modelopt_ext.workflow.quantize import run as module
from sglang_modelopt_ext.workflow.quantize.export import check_space
from sglang_modelopt_ext.workflow.quantize.recipes import Changes
from sglang_modelopt_ext.workflow.quantize.record import (
    Calibration,
    KVCache,
    LayerFormat,
    Record,
    Selection,
    read_record,
)
from sglang_modelopt_ext.workflow.quantize.run import Options, Quantized, quantize
from tests.support.models import TinyModel, model_dir, random_ids
from tests.support.moe import tiny
from tests.support.reference import Reference

RECIPE = "W4A8_NVFP4_FP8"
SMALL = TinyModel(dtype="float32", hidden=128, intermediate=256, heads=2, kv_heads=1)
TEXTS = ("import os\n\ndef first(path):\n    return os.fspath(path)\n" * 8, "x = [1, 2, 3]\n" * 20)
IDS = tuple(random_ids(32, seed=70 + i, vocab=511) for i in range(4))


@pytest.fixture(scope="module")
def model() -> Path:
    """A tiny random Llama with a tokenizer."""
    return model_dir(SMALL)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of calibration text."""
    file = tmp_path_factory.mktemp("data") / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return str(file)


def run(model: Path, output: Path, data: str, recipe: str = RECIPE, **options: Any) -> Quantized:
    """:func:`quantize` without progress, on few tokens."""
    overwrite = options.pop("overwrite", False)
    chosen = Options(recipe=recipe, data=(data,), samples=4, sequence_length=32, device="cpu", **options)
    done = quantize(str(model), output, chosen, overwrite=overwrite, progress=False)
    assert done is not None
    return done


def names(folder: Path) -> set[str]:
    """What is in a folder, hidden leftovers included."""
    return {file.name for file in folder.iterdir()}


def old_checkpoint(folder: Path) -> Path:
    """A folder that looks like an earlier result."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "old").touch()
    return folder


def not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a model is loaded."""
    monkeypatch.setattr(module, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))


class TestExperts:
    """A mixture of experts, whose weights transformers keeps together."""

    @pytest.fixture(scope="class")
    def mixture(self) -> Path:
        """A tiny Qwen3-MoE."""
        return model_dir(tiny("qwen3_moe"))

    def test_experts_only(self, mixture: Path, data: str, tmp_path: Path) -> None:
        done = run(mixture, tmp_path / "out", data, "NVFP4_EXPERTS_ONLY")
        linears = done.exported.checkpoint.linears
        assert linears
        assert all(".experts." in name for name in linears)
        assert done.exported.record.rounds_activations, "the experts' inputs are"

    def test_an_excluded_parent_takes_its_experts_along(self, mixture: Path, data: str, tmp_path: Path) -> None:
        done = run(mixture, tmp_path / "out", data, selection=Selection(exclude=("model.layers.0",)))
        assert {name.split(".")[1] for name in done.exported.checkpoint.linears} == {"1"}
        assert done.exported.checkpoint.experts.keys() == {"layers.1.mlp.experts"}

    def test_what_modelopt_cannot_export(self, mixture: Path, data: str, tmp_path: Path) -> None:
        with pytest.raises(ModelOptExtError, match="NVFP4_AWQ_LITE: expected a recipe ModelOpt can export"):
            run(mixture, tmp_path / "out", data, "NVFP4_AWQ_LITE", layerwise=False)
        assert not names(tmp_path)


class TestComplete:
    """What is in an export beside ModelOpt's own files."""

    def test_everything_is_recorded(self, model: Path, data: str, tmp_path: Path) -> None:
        done = run(model, tmp_path / "out", data, "nvfp4", changes=Changes(kv="nvfp4_rotate"), seed=3)
        folder = done.exported.folder
        assert names(tmp_path) == {"out"}
        content = json.loads((folder / "hf_quant_config.json").read_text())
        assert content["quantization"]["quant_algo"] == "NVFP4", "ModelOpt's own fields stay"
        record = read_record(folder)
        assert record == done.exported.record
        assert set(content[OWN_KEY]) == set(Record.__struct_fields__)
        assert record is not None
        assert (record.rounds_activations, record.kv_cache_recipe) == (True, "nvfp4_rotate")
        assert record.kv_cache is not None
        assert (record.kv_cache.rotate, record.kv_cache.affine, record.kv_cache.calibrated) == (True, False, True)
        assert record.algorithm[0]["method"] == "max"
        assert record.base_model == str(model)
        assert record.simulation == modelopt_cpu.NAME
        assert record.calibration is not None
        assert record.calibration.seed == 3
        assert record.calibration.data == (data,)
        assert len(record.calibration.sha256) == 64
        (group,) = record.formats
        assert (group.algo, group.group_size, group.pre_quant_scale, len(group.layers)) == ("NVFP4", 16, False, 14)
        assert record.versions["nvidia-modelopt"] == "0.47.0"
        plan = read_plan(folder, read_quant_config(folder), "auto")
        assert plan is not None
        assert plan.recipe.rotate

    def test_every_field_is_documented(self) -> None:
        page = (Path(__file__).resolve().parents[2] / "docs" / "quantize.md").read_text(encoding="utf-8")
        rows = {line.split("|")[1].strip().strip("`"): line for line in page.splitlines() if line.startswith("| `")}
        assert set(Record.__struct_fields__) <= rows.keys()
        for name, part in (
            ("calibration", Calibration),
            ("kv_cache", KVCache),
            ("selection", Selection),
            ("formats", LayerFormat),
        ):
            assert all(f"`{field}`" in rows[name] for field in part.__struct_fields__), name

    def test_model_card_and_tokenizer(self, model: Path, data: str, tmp_path: Path) -> None:
        options = Options(recipe="fp8", data=(data,), sequence_length=32, device="cpu")
        done = quantize(str(model), tmp_path / "out", options, quality={"perplexity": 25.5}, progress=False)
        assert done is not None
        folder = done.exported.folder
        card = (folder / "README.md").read_text()
        for text in (str(model), "`fp8`", "8.0", "perplexity | 25.5", f"--model-path {folder}", "sha256", "FP8"):
            assert text in card
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / file).read_bytes() == (model / file).read_bytes()
        (tmp_path / "new").touch()
        assert {file.stat().st_mode for file in folder.iterdir()} == {(tmp_path / "new").stat().st_mode}

    def test_smoothing_flags_are_recorded_by_layer(self, model: Path, data: str, tmp_path: Path) -> None:
        """ModelOpt folds AWQ's scales into the norms where it can; the record says where it could not."""
        done = run(model, tmp_path / "out", data, "nvfp4_awq_lite")
        smoothed = {name for group in done.exported.record.formats if group.pre_quant_scale for name in group.layers}
        stored = {name for name in load_file(done.exported.folder / "model.safetensors") if "pre_quant_scale" in name}
        assert smoothed
        assert {f"{name}.pre_quant_scale" for name in smoothed} == stored
        assert done.exported.record.searched == done.exported.record.smoothed == 14

    @pytest.mark.parametrize("kv", ["fp8", "fp8_affine", "fp8_cast", "nvfp4_affine", "nvfp4_cast"])
    def test_kv_cache_alone(self, model: Path, data: str, tmp_path: Path, kv: str) -> None:
        done = run(model, tmp_path / "out", data, "none", changes=Changes(kv=kv))
        record = done.exported.record
        assert record.kv_cache_recipe == kv.removesuffix("_cast")
        assert record.kv_cache is not None
        assert record.kv_cache.calibrated is not kv.endswith("_cast")
        assert record.bits_per_weight is None
        assert not done.exported.checkpoint.linears
        plan = read_plan(done.exported.folder, read_quant_config(done.exported.folder), "auto")
        assert plan is not None
        assert plan.recipe.name == record.kv_cache_recipe
        assert bool(plan.layers) is record.kv_cache.calibrated

    def test_calibrating_a_kv_cache_leaves_mxfp4_layers_static(self, model: Path, data: str, tmp_path: Path) -> None:
        record = run(model, tmp_path / "out", data, "W4A8_MXFP4_FP8", changes=Changes(kv="fp8")).exported.record
        assert {(group.algo, group.activation) for group in record.formats} == {("W4A8_MXFP4_FP8", "fp8_static")}
        assert "activations fp8_static" in (tmp_path / "out" / "README.md").read_text()

    def test_a_recipe_file_and_its_kv_cache_taken_away(self, model: Path, data: str, tmp_path: Path) -> None:
        name = "general/ptq/fp8_default-kv_fp8"
        with_cache = run(model, tmp_path / "with", data, name).exported.record
        without = run(model, tmp_path / "without", data, name, changes=Changes(kv="none")).exported.record
        assert (with_cache.kv_cache_recipe, without.kv_cache_recipe) == ("fp8", None)
        assert with_cache.recipe == name


class TestFP8SmoothQuant:
    """ModelOpt 0.47 skips it with a warning."""

    @pytest.mark.parametrize("alpha", [0.5, 1.0])
    def test_scales_are_those_of_the_formula(self, model: Path, data: str, tmp_path: Path, alpha: float) -> None:
        changes = Changes(algorithm="smoothquant", alpha=alpha)
        done = run(model, tmp_path / "out", data, "fp8", changes=changes, layerwise=False)
        assert (done.exported.record.smoothed, done.exported.record.algorithm[0]) == (
            14,
            {"method": "fp8_smoothquant", "alpha": alpha},
        )
        amax = input_maxima(model, data)
        weights, exported = (
            load_file(model / "model.safetensors"),
            load_file(done.exported.folder / "model.safetensors"),
        )
        for name, largest in amax.items():
            weight = weights[f"{name}.weight"].double()
            scale = weight.abs().amax(dim=0) ** (1 - alpha) / largest.double() ** alpha
            expected = torch.where(largest == 0, 1.0, scale).clamp(1e-4, 1e4)
            stored = exported[f"{name}.pre_quant_scale"].double()
            if alpha == 1.0 or not name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
                # Two roundings of float32 in the powers, one in the quotient.
                torch.testing.assert_close(stored, expected, rtol=1e-5, atol=0)
            smoothed = (largest.double() * stored).max() / 448
            if not name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
                torch.testing.assert_close(
                    exported[f"{name}.input_scale"].double().reshape(()), smoothed, rtol=1e-5, atol=0
                )

    def test_export_computes_what_modelopt_simulates(
        self, model: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        simulated = simulated_logprobs(monkeypatch)
        run(model, tmp_path / "out", data, "fp8", changes=Changes(algorithm="smoothquant", alpha=0.5))
        reference = Reference(tmp_path / "out")
        exported = torch.cat([reference.logprobs(ids) for ids in IDS])
        plain = Reference(run(model, tmp_path / "plain", data, "fp8").exported.folder)
        difference = (exported - simulated()).abs().amax(dim=1).median()
        assert float(difference) < 1e-3, (
            "most rows agree to float32's rounding; the others had an FP8 rounding tip over"
        )
        assert float((torch.cat([plain.logprobs(ids) for ids in IDS]) - exported).abs().amax(dim=1).median()) > 0.05

    def test_int8_is_modelopts_own(self, model: Path, data: str, tmp_path: Path) -> None:
        done = run(model, tmp_path / "out", data, "int8_smoothquant", changes=Changes(alpha=0.5))
        assert done.exported.record.algorithm[0]["method"] == "smoothquant"
        assert all(group.pre_quant_scale for group in done.exported.record.formats)


def input_maxima(model: Path, data: str) -> dict[str, torch.Tensor]:
    """The largest magnitude of each input channel of every layer, over the windows :func:`run` takes."""
    from transformers import AutoModelForCausalLM

    from sglang_modelopt_ext.workflow.common.text import load_tokenizer
    from sglang_modelopt_ext.workflow.quantize.calibration import load_calibration

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            largest = inputs[0].abs().flatten(0, -2).amax(dim=0)
            found[name] = torch.maximum(found[name], largest) if name in found else largest

        return see

    for name, layer in loaded.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.register_forward_pre_hook(hook(name))
    windows = load_calibration([data], load_tokenizer(model), samples=4, sequence_length=32, progress=False)
    with torch.no_grad():
        for batch in windows.batches():
            loaded(batch)
    return found


def simulated_logprobs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], torch.Tensor]:
    """Has the calibrated model, as ModelOpt is about to export it, score :data:`IDS`; returns what gets the result."""
    from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers

    found: list[torch.Tensor] = []
    plain = module.export_checkpoint

    def before(loaded: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            requantize_resmooth_fused_llm_layers(loaded)
            found.append(torch.cat([loaded(torch.tensor([ids])).logits[0].float().log_softmax(-1) for ids in IDS]))
        return plain(loaded, *args, **kwargs)

    monkeypatch.setattr(module, "export_checkpoint", before)
    return lambda: found[0]


class TestSelection:
    """Which layers are left out."""

    def test_mlp_only_and_exclude(self, model: Path, data: str, tmp_path: Path) -> None:
        selection = Selection(mlp_only=True, exclude=("*layers.0.mlp.down_proj",))
        done = run(model, tmp_path / "out", data, selection=selection)
        kept = {f"layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("gate", "up", "down")}
        assert set(done.exported.checkpoint.linears) == kept - {"layers.0.mlp.down_proj"}
        assert done.exported.record.selection == selection

    def test_override(self, model: Path, data: str, tmp_path: Path) -> None:
        changes = Changes(overrides=("algorithm.alpha_step=0.5",))
        done = run(model, tmp_path / "out", data, "nvfp4_awq_lite", changes=changes)
        assert done.exported.record.algorithm[0]["alpha_step"] == 0.5
        assert done.exported.record.selection.overrides == ("algorithm.alpha_step=0.5",)

    @pytest.mark.parametrize(
        ("selection", "message"),
        [
            (Selection(exclude=("*expert*",)), r"--exclude: expected a pattern that names a layer .* got \*expert\*"),
            (Selection(exclude=("*q_proj",)), r"SGLang fuses them into one layer, got q_proj unquantized, k_proj W4A8"),
            (Selection(exclude=("model.layers",)), "expected layers or a KV cache|expected a layer or a KV cache"),
        ],
    )
    def test_refused(self, model: Path, data: str, tmp_path: Path, selection: Selection, message: str) -> None:
        with pytest.raises(ModelOptExtError, match=message):
            run(model, tmp_path / "out", data, selection=selection)
        assert names(tmp_path) == set()


class TestIgnored:
    """What ModelOpt would pass over is refused."""

    @pytest.mark.parametrize(
        ("recipe", "algorithm", "message"),
        [
            (
                "nvfp4",
                "smoothquant",
                "smoothquant: expected INT8 or static FP8 weights and activations, got model.layers.0",
            ),
            ("fp8_per_channel_per_token", "smoothquant", "expected INT8 or static FP8"),
            ("nvfp4", "local_hessian", "expected static NVFP4 weights, or algorithm.fp8_scale_sweep=false"),
            ("fp8", "awq_clip", "awq_clip: expected weights in one-dimensional blocks"),
            ("fp8", "awq_full", "awq_full: expected weights in one-dimensional blocks"),
            ("fp8_2d_blockwise_weight_only", "awq_clip", "awq_clip: expected weights in one-dimensional blocks"),
            ("fp8_per_channel_per_token", "awq_lite", "activations not scaled by token"),
            ("nvfp4_w4a4_weight_mse_fp8_sweep", "awq_lite", "weights without static NVFP4"),
            ("w4a8_awq_beta", "smoothquant", "expected INT8 or static FP8"),
            ("mxfp8", "awq_full", "awq_full: expected weights in one-dimensional blocks"),
            ("fp8", "svdquant", "svdquant: expected dynamic NVFP4"),
            ("mxfp4", "mse", "mse: expected weights under static scales"),
            (
                "w4a16_nvfp4",
                "awq_lite",
                "NVFP4_AWQ, whose activations are nvfp4_dynamic, with activations that are not",
            ),
            ("w4a8_nvfp4_fp8", "awq_lite", "NVFP4_AWQ in blocks of 32"),
        ],
    )
    def test_before_the_run(
        self, model: Path, data: str, tmp_path: Path, recipe: str, algorithm: str, message: str
    ) -> None:
        with pytest.raises(ModelOptExtError, match=message):
            run(model, tmp_path / "out", data, recipe, changes=Changes(algorithm=algorithm))
        assert names(tmp_path) == set()

    def test_after_the_run(self, model: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """ModelOpt's smoothquant on FP8, as if this package had no version of its own."""
        monkeypatch.setattr(module.checks, "resolve_steps", lambda loaded, steps: [dict(step) for step in steps])
        monkeypatch.setattr(module.checks, "step_takes", lambda step: (lambda layer: True, "anything"))
        with pytest.raises(
            ModelOptExtError, match="smoothquant: expected a smoothed layer, got one that ModelOpt passed over"
        ):
            run(model, tmp_path / "out", data, "fp8", changes=Changes(algorithm="smoothquant"), layerwise=False)

    @pytest.mark.parametrize("recipe", ["mxfp6", "MXINT8_DEFAULT"])
    def test_formats_that_cannot_be_exported(
        self, model: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
    ) -> None:
        not_started(monkeypatch)
        with pytest.raises(ModelOptExtError, match="expected one that can be served"):
            run(model, tmp_path / "out", data, recipe)


class TestBadInput:
    """Everything by name, and nothing left behind."""

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
            ("general/auto_quantize/nvfp4_fp8_at_5p4bits", "expected a known name, such as general/ptq/"),
            ("missing.yaml", "expected a recipe ModelOpt can load"),
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
    """A copy of the model with one entry of some weights (NaN), or all of them (other values), replaced."""
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
        "from sglang_modelopt_ext.workflow.quantize.export import partial_folder\n"
        f"with partial_folder(Path({str(tmp_path / 'out')!r})) as folder:\n"
        "    (folder / 'half').touch()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    with export_module.partial_folder(tmp_path / "out") as mine:
        assert names(tmp_path) == {mine.name}
        with export_module.partial_folder(tmp_path / "out") as other:
            assert names(tmp_path) == {mine.name, other.name}, "a folder in use stays"
    assert names(tmp_path) == set()
