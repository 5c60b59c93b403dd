"""The decoded export of ``verify`` against a reading that shares nothing with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_modelopt_ext.checkpoint.kv_cache import read_plan
from sglang_modelopt_ext.checkpoint.quant_config import read_quant_config
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.env import FP4_ACTIVATIONS, MXFP4_ACTIVATIONS, W4A8_MATH
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.verify.reference import ReferenceModel
from tests.layers.test_recipes import RECIPES, mixed_checkpoint
from tests.serving.checks import FP32_MEDIAN, SHORT_PROMPTS
from tests.support import edits
from tests.support.exports import export, mixed_recipe
from tests.support.kv_exports import PRESETS, kv_export
from tests.support.models import FAMILIES, Family, TinyModel, model_dir
from tests.support.reference import Difference, Reference, difference

FAST: tuple[tuple[str, Family], ...] = (
    ("W4A8_NVFP4_FP8_CFG", "qwen2"),
    ("W4A8_MXFP4_FP8_CFG", "llama"),
    ("NVFP4_SVDQUANT_DEFAULT_CFG", "qwen2"),
    ("INT8_SMOOTHQUANT_CFG", "llama"),
    ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "llama"),
)

FAST_KV = ("fp8_affine", "nvfp4_affine", "nvfp4_rotate")


@pytest.fixture(autouse=True)
def mxfp4_rounds_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MXFP4_ACTIVATIONS.variable, "mxfp4")


def apart(model: ReferenceModel, reference: Reference) -> Difference:
    """Return the distance over several short prompts, without the last row of each."""
    own = torch.cat([torch.from_numpy(model.logprobs(ids)) for ids in SHORT_PROMPTS])
    return difference(own, torch.cat([reference.logprobs(ids)[:-1] for ids in SHORT_PROMPTS]))


def check(folder: Path) -> None:
    found = apart(ReferenceModel(folder), Reference(folder))
    assert found.median < FP32_MEDIAN, str(found)


@pytest.mark.parametrize(("recipe", "family"), FAST)
def test_recipes(recipe: str, family: Family) -> None:
    check(export(model_dir(TinyModel(family)), recipe))


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_on_every_family(recipe: str, family: Family) -> None:
    check(export(model_dir(TinyModel(family)), recipe))


def test_mixed_precision(tmp_path: Path) -> None:
    check(mixed_checkpoint(tmp_path))


def test_a_mix_with_calibrated_mxfp4(tmp_path: Path) -> None:
    """Static where the scale is stored, by token where it is not."""
    folder = export(
        model_dir(TinyModel("qwen2")), mixed_recipe({"*self_attn*": "W4A8_MXFP4_FP8_CFG", "*mlp*": "FP8_DEFAULT_CFG"})
    )
    check(folder)
    assert apart(ReferenceModel(folder), Reference(folder, activation="per_token")).median > 10 * FP32_MEDIAN
    check(edits.copy_with(folder, tmp_path / "mix", [edits.drop_tensors("*1.self_attn.o_proj.input_scale")]))


def test_unquantized() -> None:
    check(model_dir(TinyModel("qwen3", tied=True)))


def test_a_stored_head_of_a_tied_model_is_not_read(tmp_path: Path) -> None:
    source = model_dir(TinyModel("qwen3", tied=True))
    head = {"lm_head.weight": torch.full((512, 256), 7.0, dtype=torch.bfloat16)}
    folder = edits.copy_with(source, tmp_path / "model", [edits.add_tensors(head)])
    found = apart(ReferenceModel(folder), Reference(source))
    assert found.median < FP32_MEDIAN, str(found)


def test_quantized_vocabulary(tmp_path: Path) -> None:
    source = export(model_dir(TinyModel("llama")), "NVFP4_FP8_MHA_CONFIG")
    changes = [
        edits.drop_embedded_config,
        edits.set_file_config({"kv_cache_quant_algo": None}),
        edits.drop_tensors("*.[kv]_scale"),
    ]
    check(edits.copy_with(source, tmp_path / "checkpoint", changes))


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[] if name in FAST_KV else [pytest.mark.full]) for name in PRESETS]
)
def test_kv_caches(recipe: str) -> None:
    folder = kv_export(recipe, "mistral", "W4A8_NVFP4_FP8_CFG" if recipe == "nvfp4_affine" else None)
    flag = "modelopt_nvfp4_rotate" if recipe == "nvfp4_rotate" else "auto"
    plan = read_plan(folder, read_quant_config(folder), flag)
    assert plan is not None
    assert plan.recipe.name == recipe
    found = apart(ReferenceModel(folder, kv_cache=plan), Reference(folder, kv_cache=recipe))
    assert found.median < FP32_MEDIAN, str(found)
    plain = apart(ReferenceModel(folder), Reference(folder, kv_cache=recipe))
    assert plain.median > 10 * FP32_MEDIAN, "the cache's rounding does not show"


def test_math_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(model_dir(TinyModel("qwen2")), "W4A8_NVFP4_FP8_CFG")
    monkeypatch.setenv(W4A8_MATH.variable, "fp8")
    found = apart(ReferenceModel(folder), Reference(folder, math="fp8"))
    assert found.median < FP32_MEDIAN, str(found)
    monkeypatch.delenv(W4A8_MATH.variable)
    assert apart(ReferenceModel(folder), Reference(folder, math="fp8")).median > 10 * FP32_MEDIAN


def test_fp4_activations_are_those_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(model_dir(TinyModel("llama")), "NVFP4_DEFAULT_CFG")
    found = apart(ReferenceModel(folder, target=Device.cuda(90)), Reference(folder, activation="none"))
    assert found.median < FP32_MEDIAN, str(found)
    monkeypatch.setenv(FP4_ACTIVATIONS.variable, "round")
    found = apart(ReferenceModel(folder, target=Device.cuda(90)), Reference(folder))
    assert found.median < FP32_MEDIAN, str(found)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edits.drop_tensors("model.norm.weight"), "expected a tensor for every parameter of the model, got none"),
        (edits.set_fields("config.json", {"num_hidden_layers": 1}), "got no such layer in the model"),
        (
            edits.set_fields("config.json", {"intermediate_size": 256}),
            r"expected a layer \[256, 512\], got \[256, 256\] in the model",
        ),
        (edits.set_fields("config.json", {"vocab_size": 500}), r"expected a parameter \[512, 256\] of the model"),
        (edits.set_fields("config.json", {"model_type": "none_such"}), "one that transformers knows"),
    ],
)
def test_a_model_that_does_not_fit(tmp_path: Path, edit: edits.Edit, message: str) -> None:
    source = export(model_dir(TinyModel("llama")), "W4A8_NVFP4_FP8_CFG")
    with pytest.raises(ModelOptExtError, match=message):
        ReferenceModel(edits.copy_with(source, tmp_path / "bad", [edit]))
