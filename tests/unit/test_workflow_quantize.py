"""Quantizing writes a whole, checked, complete checkpoint or leaves everything as it was. ModelOpt is the real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sglang_modelopt_ext.checkpoint.kv_cache import read_plan
from sglang_modelopt_ext.checkpoint.quant_config import OWN_KEY, read_quant_config
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common import modelopt_cpu
from sglang_modelopt_ext.workflow.quantize import run as module
from sglang_modelopt_ext.workflow.quantize.recipes import Changes
from sglang_modelopt_ext.workflow.quantize.record import (
    Calibration,
    KVCache,
    LayerFormat,
    Record,
    Selection,
    read_record,
)
from sglang_modelopt_ext.workflow.quantize.run import Options, quantize
from tests.support.models import model_dir
from tests.support.moe import tiny
from tests.support.quantizing import IDS, SMALL, calibration_file, names, not_started, run
from tests.support.reference import Reference


@pytest.fixture(scope="module")
def model() -> Path:
    """Return a tiny random Llama with a tokenizer."""
    return model_dir(SMALL)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a file of calibration text."""
    return calibration_file(tmp_path_factory.mktemp("data"))


class TestExperts:
    """A mixture of experts, whose weights transformers keeps together."""

    @pytest.fixture(scope="class")
    def mixture(self) -> Path:
        """Return a tiny Qwen3-MoE."""
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
        with pytest.raises(ModelOptExtError, match=r"experts: expected experts in a format .*, got NVFP4_AWQ$"):
            run(mixture, tmp_path / "out", data, "NVFP4_AWQ_LITE", layerwise=False)
        with pytest.raises(
            ModelOptExtError, match=r"experts: expected a calibration that reaches .*, got smoothquant$"
        ):
            run(mixture, tmp_path / "out", data, "INT8_SMOOTHQUANT")
        assert not names(tmp_path)


class TestComplete:
    """The content of an export besides ModelOpt's own files."""

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
    """Return the largest magnitude of each input channel of every layer, over the windows :func:`run` takes."""
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
    """Score :data:`IDS` with the calibrated model just before ModelOpt exports it; returns the list of the result."""
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
    """The layers that are left out."""

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
    """Settings that ModelOpt would skip are rejected."""

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
            ModelOptExtError, match="smoothquant: expected a smoothed layer, got one that ModelOpt skipped"
        ):
            run(model, tmp_path / "out", data, "fp8", changes=Changes(algorithm="smoothquant"), layerwise=False)

    @pytest.mark.parametrize("recipe", ["mxfp6", "MXINT8_DEFAULT"])
    def test_formats_that_cannot_be_exported(
        self, model: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
    ) -> None:
        not_started(monkeypatch)
        with pytest.raises(ModelOptExtError, match="expected one that can be served"):
            run(model, tmp_path / "out", data, recipe)
