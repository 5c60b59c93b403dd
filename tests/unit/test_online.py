"""Quantization at load: equal to ModelOpt's exports without the search, less error with it, and whole at any moment."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("modelopt")

from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME, QUANT_CONFIG_NAME
from sglang_modelopt_ext.checkpoint.reader import check_all_values, read_checkpoint
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.online import convert as convert_module
from sglang_modelopt_ext.online import shards, tensors
from sglang_modelopt_ext.online.convert import convert
from sglang_modelopt_ext.online.recipe import Recipe, recipe_for
from sglang_modelopt_ext.online.selection import DISABLED
from sglang_modelopt_ext.workflow.quantize.record import read_record
from sglang_modelopt_ext.workflow.verify.simulation import objection
from tests.support import edits, expert_models
from tests.support.exports import export
from tests.support.faults import KILLED, count_changes, killed_at, small_disk
from tests.support.models import TinyModel, model_dir
from tests.support.moe import tiny

MXFP4 = "W4A8_MXFP4_FP8"
LLAMA = TinyModel("llama")
SMALL = TinyModel("llama", hidden=128, intermediate=256, heads=2, kv_heads=1, layers=1)
MODELS = (
    LLAMA,
    TinyModel("qwen2"),
    TinyModel("qwen3", tied=True),
    TinyModel("phi3"),
    tiny("qwen3_moe"),
    tiny("mixtral"),
)


def declared(folder: Path) -> tuple[object, object]:
    """Return both quantization sections without the producer."""
    section = json.loads((folder / CONFIG_NAME).read_text())["quantization_config"]
    section.pop("producer")
    return section, json.loads((folder / QUANT_CONFIG_NAME).read_text())["quantization"]


def assert_equal(ours: Path, theirs: Path) -> None:
    """Check that two folders store the same tensors, bit for bit, and declare the same quantization."""
    mine, other = edits.read_tensors(ours), edits.read_tensors(theirs)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name
    assert declared(ours) == declared(theirs)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_without_a_search_it_is_the_export_of_modelopt(model: TinyModel, tmp_path: Path) -> None:
    made = convert(model_dir(model), Recipe(MXFP4, search=False), tmp_path)
    assert_equal(made.folder, export(model_dir(model), "W4A8_MXFP4_FP8_CFG"))


@pytest.mark.parametrize("kind", ["nemotron_h", "glm4_moe"])
def test_names_that_transformers_changes(kind: expert_models.Kind, tmp_path: Path) -> None:
    """The quantized layers are ModelOpt's, by their stored names; others keep their type, which ModelOpt does not leave a bias."""
    source = expert_models.model_dir(kind)
    folder = convert(source, Recipe(MXFP4, search=False), tmp_path).folder
    ours, theirs = edits.read_tensors(folder), edits.read_tensors(export(source, "W4A8_MXFP4_FP8_CFG"))
    stored = edits.read_tensors(source)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name] if tensor.dtype == torch.uint8 else stored[name]), name
    assert {name for name, tensor in ours.items() if tensor.dtype == torch.uint8} == {
        name for name, tensor in theirs.items() if tensor.dtype == torch.uint8
    }


def test_mxfp4_is_the_export_of_modelopt_and_says_whether_it_rounds_activations(tmp_path: Path) -> None:
    made = convert(model_dir(LLAMA), Recipe("mxfp4", search=False, rounds_activations=False), tmp_path)
    assert_equal(made.folder, export(model_dir(LLAMA), "MXFP4_DEFAULT_CFG"))
    assert read_checkpoint(made.folder).config.rounds_activations is False


@pytest.mark.parametrize("model", [LLAMA, tiny("qwen3_moe"), tiny("mixtral")], ids=lambda model: model.name)
def test_nvfp4_with_given_input_scales_is_the_export_of_modelopt(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of a few rows, so that global scales are those of the whole layers."""
    monkeypatch.setattr(tensors, "ENTRIES", 10_000)
    theirs = export(model_dir(model), "W4A8_NVFP4_FP8_CFG")
    made = convert(model_dir(model), Recipe("W4A8_NVFP4_FP8", search=False, input_scales=theirs), tmp_path)
    assert_equal(made.folder, theirs)


@pytest.mark.parametrize("algo", [MXFP4, "W4A8_NVFP4_FP8"])
def test_the_search_has_less_error_in_all_layers(algo: str, tmp_path: Path) -> None:
    source = model_dir(LLAMA)
    scales = export(source, "W4A8_NVFP4_FP8_CFG") if algo.endswith("NVFP4_FP8") else None
    weights = edits.read_tensors(source)
    found, most = (
        read_checkpoint(convert(source, Recipe(algo, search, input_scales=scales), tmp_path).folder)
        for search in (True, False)
    )
    check_all_values(found)
    assert [linear.name for linear in found.layers] == [linear.name for linear in most.layers]
    for linear in found.layers:
        name = linear.name
        errors = []
        for checkpoint in (found, most):
            tensors = edits.read_tensors(checkpoint.folder)
            own = {spec.name: tensors[f"{name}.{spec.name}"] for spec in linear.scheme.weight.tensors}
            decoded = linear.scheme.weight.decode(own).dequantize().double()
            errors.append((weights[f"{name}.weight"].double() - decoded).square().sum())
        assert errors[0] < errors[1], name
    record = read_record(found.folder)
    assert record is not None
    assert record.quality["squared_weight_error"] < record.quality["squared_weight_error_max"]
    assert record.recipe == algo
    assert objection(found.folder) == "it was quantized at load, without ModelOpt"


def test_parts_and_files_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = edits.copy_with(model_dir(LLAMA), tmp_path / "model", [edits.shard()])
    whole = convert(source, Recipe(MXFP4), tmp_path / "whole").folder
    monkeypatch.setattr(tensors, "ENTRIES", 5_000)
    monkeypatch.setattr(shards, "LARGEST", 100_000)
    parts = convert(source, Recipe(MXFP4), tmp_path / "parts").folder
    assert (parts / edits.INDEX).exists()
    assert len(list(parts.glob("*.safetensors"))) > 3
    assert_equal(parts, whole)
    read_checkpoint(parts)


def test_everything_else_of_the_folder_comes_along(tmp_path: Path) -> None:
    source = edits.copy_with(model_dir(SMALL), tmp_path / "model")
    (source / "modeling_own.py").write_text("")
    (source / "pytorch_model.bin").write_text("")
    folder = convert(source, Recipe(MXFP4), tmp_path).folder
    expected = {file.name for file in source.iterdir()} - {"pytorch_model.bin"} | {QUANT_CONFIG_NAME}
    assert {file.name for file in folder.iterdir()} == expected
    ours, theirs = (json.loads((where / CONFIG_NAME).read_text()) for where in (folder, source))
    ours.pop("quantization_config")
    assert ours == theirs


def test_a_layer_of_another_k_is_left_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = TinyModel("llama", hidden=128, intermediate=272, heads=2, kv_heads=1, layers=1)
    with caplog.at_level(logging.WARNING):
        folder = convert(model_dir(spec), Recipe(MXFP4), tmp_path).folder
    assert "model.layers.0.mlp.down_proj (K = 272 is not a multiple of 32)" in caplog.text
    checkpoint = read_checkpoint(folder)
    assert "model.layers.0.mlp.down_proj" in checkpoint.config.exclude_modules
    assert edits.read_tensors(folder)["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16


class TestCache:
    """One result for each content and recipe."""

    def test_a_hit_does_no_work(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = convert(model_dir(SMALL), Recipe(MXFP4), tmp_path)
        monkeypatch.setattr(convert_module, "_write", lambda *args: pytest.fail("it was made again"))
        again = convert(model_dir(SMALL), Recipe(MXFP4), tmp_path)
        assert (first.cached, again.cached) == (False, True)
        assert first.folder == again.folder

    def test_other_content_makes_another(self, tmp_path: Path) -> None:
        source = edits.copy_with(model_dir(SMALL), tmp_path / "model")
        folders = [
            convert(source, Recipe(MXFP4), tmp_path).folder,
            convert(source, Recipe(MXFP4, False), tmp_path).folder,
        ]
        edits.map_tensors("*.q_proj.weight", torch.neg)(source)
        folders.append(convert(source, Recipe(MXFP4), tmp_path).folder)
        (source / "tokenizer_config.json").write_text("{}")
        folders.append(convert(source, Recipe(MXFP4), tmp_path).folder)
        folders.append(convert(source, Recipe("mxfp4"), tmp_path).folder)
        assert len(set(folders)) == 5

    def test_a_copy_of_the_model_is_the_same(self, tmp_path: Path) -> None:
        first, second = (edits.copy_with(model_dir(SMALL), tmp_path / name / "model") for name in "ab")
        assert convert(first, Recipe(MXFP4), tmp_path).folder == convert(second, Recipe(MXFP4), tmp_path).folder

    def test_any_name_of_a_folder(self, tmp_path: Path) -> None:
        source = edits.copy_with(model_dir(SMALL), tmp_path / ("a [model] " + 200 * "x"))
        made = convert(source, Recipe(MXFP4), tmp_path / "cache")
        assert made.folder.name.startswith("a__model__xxx")
        assert len(made.folder.name) < 120

    def test_two_processes_make_one(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("fork")
        with context.Pool(2) as pool:
            made = pool.starmap(convert, [(model_dir(SMALL), Recipe(MXFP4), tmp_path)] * 2, chunksize=1)
        assert sorted(one.cached for one in made) == [False, True]
        assert made[0].folder == made[1].folder
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [made[0].folder.name]


class TestFaults:
    """A result is whole or absent."""

    def test_killed_at_any_change(self, tmp_path: Path) -> None:
        def run() -> None:
            convert(model_dir(SMALL), Recipe(MXFP4), cache)

        cache = tmp_path / "counted"
        changes = count_changes(run, cache)
        whole = next(path for path in cache.iterdir() if path.is_dir())
        for change in range(changes):
            cache = tmp_path / f"killed-{change}"
            assert killed_at(change, run, cache) == KILLED
            visible = [path for path in cache.glob("*") if path.is_dir() and not path.name.startswith(".")]
            for path in visible:
                assert_equal(path, whole)
            run()
            left = {path.name for path in cache.iterdir() if path.is_dir()}
            assert left == {whole.name}, f"change {change}"
            assert_equal(cache / whole.name, whole)

    def test_a_full_disk_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(convert_module, "check_space", lambda folder, needed: None)
        with small_disk(tmp_path / "disk", 150) as resize:
            with pytest.raises(ModelOptExtError, match="space on disk: expected room for the checkpoint"):
                convert(model_dir(SMALL), Recipe(MXFP4), tmp_path / "disk")
            assert not [path for path in (tmp_path / "disk").iterdir() if path.is_dir()]
            resize(64 * 1024)
            convert(model_dir(SMALL), Recipe(MXFP4), tmp_path / "disk")

    def test_no_room_is_found_before_the_work(self, tmp_path: Path) -> None:
        with (
            small_disk(tmp_path / "disk", 150),
            pytest.raises(ModelOptExtError, match=r"space on disk: expected .* MB free"),
        ):
            convert(model_dir(SMALL), Recipe(MXFP4), tmp_path / "disk")

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ModelOptExtError, match="expected one that can be written to"):
            convert(model_dir(SMALL), Recipe(MXFP4), tmp_path / "file" / "cache")

    def test_a_cache_that_is_only_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = convert(model_dir(SMALL), Recipe(MXFP4), tmp_path)
        monkeypatch.setattr(convert_module, "locked", lambda folder: pytest.fail("it was locked"))
        assert convert(model_dir(SMALL), Recipe(MXFP4), tmp_path).folder == first.folder

    def test_nan_names_the_tensor(self, tmp_path: Path) -> None:
        spoil = edits.map_tensors("*.up_proj.weight", lambda weight: weight.index_fill(1, torch.tensor(3), torch.nan))
        source = edits.copy_with(model_dir(SMALL), tmp_path / "model", [spoil])
        with pytest.raises(ModelOptExtError, match=r"up_proj\.weight: expected finite weights"):
            convert(source, Recipe(MXFP4), tmp_path)

    def test_a_model_that_transformers_does_not_know(self, tmp_path: Path) -> None:
        source = edits.copy_with(
            model_dir(SMALL), tmp_path / "model", [edits.set_fields(CONFIG_NAME, {"model_type": "unheard-of"})]
        )
        with pytest.raises(ModelOptExtError, match="model: expected one that transformers can build"):
            convert(source, Recipe(MXFP4), tmp_path)

    def test_a_name_of_a_function_is_no_model(self, tmp_path: Path) -> None:
        """The configuration is another's: what it names is called only where it is a model's class."""
        change = edits.set_fields(CONFIG_NAME, {"architectures": ["pipeline"]})
        source = edits.copy_with(model_dir(SMALL), tmp_path / "model", [change])
        assert read_checkpoint(convert(source, Recipe(MXFP4), tmp_path).folder).layers

    def test_packed_experts(self, tmp_path: Path) -> None:
        def pack(tensors: dict[str, torch.Tensor]) -> None:
            names = edits.matching(tensors, "model.layers.0.mlp.experts.*.down_proj.weight")
            tensors["model.layers.0.mlp.experts.down_proj"] = torch.stack([tensors.pop(name) for name in names])

        source = edits.copy_with(model_dir(tiny("qwen3_moe")), tmp_path / "model", [edits.edit_tensors(pack)])
        with pytest.raises(ModelOptExtError, match=r"experts\.down_proj: expected experts that are stored one by one"):
            convert(source, Recipe(MXFP4), tmp_path)


class TestRecipe:
    """The settings decide the recipe."""

    def test_the_defaults_need_no_data(self) -> None:
        assert recipe_for("modelopt_w4a8") == Recipe(MXFP4)
        assert recipe_for("modelopt_mxfp4") == Recipe("mxfp4")

    def test_settings(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name, value in (("RECIPE", "W4A8_NVFP4_FP8"), ("SEARCH", "max"), ("INPUT_SCALES", str(tmp_path))):
            monkeypatch.setenv(f"SGLANG_MODELOPT_EXT_ONLINE_{name}", value)
        assert recipe_for("modelopt_w4a8") == Recipe("W4A8_NVFP4_FP8", search=False, input_scales=tmp_path)

    def test_the_rounding_of_kernels_is_known(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("SGLANG_MODELOPT_EXT_W4A8_MATH", "fp8")
        assert recipe_for("modelopt_w4a8") == Recipe(MXFP4), "which rounds nothing"
        monkeypatch.setenv("SGLANG_MODELOPT_EXT_ONLINE_RECIPE", "W4A8_NVFP4_FP8")
        monkeypatch.setenv("SGLANG_MODELOPT_EXT_ONLINE_INPUT_SCALES", str(tmp_path))
        assert recipe_for("modelopt_w4a8").math == "fp8"

    def test_static_scales_must_be_given(self) -> None:
        with pytest.raises(ModelOptExtError, match="expected a file of input scales for W4A8_NVFP4_FP8, got none"):
            Recipe("W4A8_NVFP4_FP8")

    def test_scales_that_would_not_be_used(self, tmp_path: Path) -> None:
        with pytest.raises(ModelOptExtError, match="expected none for mxfp4"):
            Recipe("mxfp4", input_scales=tmp_path)

    def test_a_missing_scale_names_the_layer(self, tmp_path: Path) -> None:
        drop = edits.drop_tensors("*.o_proj.input_scale")
        scales = edits.copy_with(export(model_dir(SMALL), "W4A8_NVFP4_FP8_CFG"), tmp_path / "scales", [drop])
        with pytest.raises(ModelOptExtError, match=r"o_proj\.input_scale: expected one scale, got none"):
            convert(model_dir(SMALL), Recipe("W4A8_NVFP4_FP8", input_scales=scales), tmp_path)

    def test_a_calibrated_mxfp4_has_static_scales(self, tmp_path: Path) -> None:
        scales = export(model_dir(SMALL), "W4A8_NVFP4_FP8_CFG")
        checkpoint = read_checkpoint(convert(model_dir(SMALL), Recipe(MXFP4, input_scales=scales), tmp_path).folder)
        names = {linear.scheme.activation.name for linear in checkpoint.layers if linear.scheme.activation}
        assert names == {"fp8_static"}


def test_the_disabled_patterns_are_those_of_modelopt() -> None:
    import modelopt_recipes

    file = Path(modelopt_recipes.__file__).parent / "configs/ptq/units/default_disabled_quantizers.yaml"
    rows = yaml.safe_load(file.read_text())
    assert {row["quantizer_name"] for row in rows if "parent_class" not in row} == set(DISABLED)
    # Layers of these kinds are no linear ones.
    assert {row["parent_class"] for row in rows if "parent_class" in row} == {
        *(f"nn.BatchNorm{n}d" for n in (1, 2, 3)),
        *("nn.LeakyReLU", "nn.Embedding"),
    }
