"""The reading of a checkpoint's KV cache, and the errors that name what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sglang_modelopt_ext.checkpoint.kv_cache import KVCachePlan, kv_cache_plan, read_plan
from sglang_modelopt_ext.checkpoint.quant_config import OWN_KEY, QUANT_CONFIG_NAME, read_quant_config
from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
from sglang_modelopt_ext.errors import ModelOptExtError
from tests.support import edits
from tests.support.kv_exports import CAST_PRESETS, PRESETS, cast_export, kv_export

W4A8 = "W4A8_NVFP4_FP8_CFG"
EXPORTED_AS = {"nvfp4_rotate": "nvfp4"}
"""The rotation is lost in the export."""

RANGE = {"fp8": 448.0, "nvfp4": 2688.0}


def plan(folder: Path, flag: str = "auto") -> KVCachePlan | None:
    found = read_plan(folder, read_quant_config(folder), flag)
    if found is not None:
        _ = found.layers  # which are read, and may be wrong
    return found


def number_format(recipe: str) -> str:
    return recipe.partition("_")[0]


def refused(folder: Path, message: str, flag: str = "auto") -> None:
    with pytest.raises(ModelOptExtError, match=message):
        plan(folder, flag)


@pytest.mark.parametrize("weights", [None, W4A8])
@pytest.mark.parametrize("recipe", PRESETS)
def test_every_preset_is_found(recipe: str, weights: str | None) -> None:
    folder = kv_export(recipe, "qwen2", weights)
    found = plan(folder)
    assert found is not None
    assert found.recipe.name == EXPORTED_AS.get(recipe, recipe)
    assert found.layers.keys() == {0, 1}
    stored = edits.read_tensors(folder)
    for number, layer in found.layers.items():
        for side in "kv":
            amax = float(stored[f"model.layers.{number}.self_attn.{side}_proj.{side}_scale"]) * 448
            # One rounding of the stored quotient to float32.
            assert getattr(layer, f"{side}_scale") == pytest.approx(amax / RANGE[number_format(recipe)], rel=1e-7)
            bias = getattr(layer, f"{side}_bias")
            expected = stored.get(f"model.layers.{number}.self_attn.{side}_proj.{side}_bias")
            assert (bias is None) == (expected is None) == ("affine" not in recipe)
            if bias is not None:
                assert torch.equal(bias, expected.float()[0, :, 0])
    read_checkpoint(folder)


def _record(recipe: str) -> edits.Edit:
    return edits.set_fields(QUANT_CONFIG_NAME, {OWN_KEY: {"kv_cache_recipe": recipe}})


def test_rotation_by_flag_and_by_our_own_record(tmp_path: Path) -> None:
    folder = kv_export("nvfp4_rotate")
    by_flag = plan(folder, "modelopt_nvfp4_rotate")
    plain = plan(folder)
    assert by_flag is not None
    assert plain is not None
    assert by_flag.recipe.rotate
    assert dict(by_flag.layers) == dict(plain.layers), "the scales are the checkpoint's either way"
    recorded = edits.copy_with(folder, tmp_path / "recorded", [_record("nvfp4_rotate")])
    found = plan(recorded)
    assert found is not None
    assert found.recipe.rotate
    bad = edits.copy_with(folder, tmp_path / "bad", [_record("fp8")])
    refused(bad, r"kv_cache_recipe: expected nvfp4 or nvfp4_rotate for NVFP4, got fp8")
    unknown = edits.copy_with(folder, tmp_path / "unknown", [_record("fp3")])
    with pytest.raises(ModelOptExtError, match="kv_cache_recipe: expected one of fp8"):
        read_quant_config(unknown)


def _mixed(layers: object, recipe: str = "nvfp4") -> edits.Edit:
    fields = {"kv_cache_recipe": recipe, "kv_cache_layers": layers}
    return edits.set_fields(QUANT_CONFIG_NAME, {OWN_KEY: fields})


def test_a_recipe_for_each_layer(tmp_path: Path) -> None:
    """One layer of an NVFP4 export in FP8, by our own record: its scale is that of the FP8 export of the same model."""
    mixed = plan(edits.copy_with(kv_export("nvfp4"), tmp_path / "mixed", [_mixed({"1": "fp8", "0": "nvfp4"})]))
    nvfp4, fp8 = plan(kv_export("nvfp4")), plan(kv_export("fp8"))
    assert mixed is not None
    assert nvfp4 is not None
    assert fp8 is not None
    assert [mixed.recipes.of(number).name for number in (0, 1)] == ["nvfp4", "fp8"]
    assert mixed.describe() == "nvfp4 and fp8 in 1 layer"
    assert mixed.layers[0] == nvfp4.layers[0]
    assert mixed.layers[1] == fp8.layers[1]
    assert mixed.layers[1] != nvfp4.layers[1]
    by_flag = plan(mixed.folder or tmp_path, "modelopt_nvfp4")
    assert by_flag is not None
    assert by_flag.other == mixed.other
    sglangs = plan(mixed.folder or tmp_path, "nvfp4")
    assert sglangs is not None
    assert not sglangs.other, "SGLang's own cache has one format"
    refused(mixed.folder or tmp_path, r"fp8 or nvfp4 in layers of a cache of nvfp4", "modelopt_nvfp4_rotate")


def test_scales_of_a_mix_that_was_not_calibrated(tmp_path: Path) -> None:
    found = plan(edits.copy_with(cast_export("nvfp4"), tmp_path / "cast", [_mixed({"1": "fp8"})]))
    assert found is not None
    assert (found.layer(0).k_scale, found.layer(1).k_scale) == (448 / 2688, 1.0)


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ({"0": "nvfp4_affine"}, "fp8 or nvfp4 in layers of a cache of nvfp4, got nvfp4_affine in one of nvfp4"),
        ({"2": "fp8"}, "expected layers below 2, got 2"),
        ({"0": "fp3"}, "kv_cache_layers.0: expected one of fp8"),
        ({"01": "fp8"}, "expected layer numbers, got '01'"),
        ({"-1": "fp8"}, "expected layer numbers, got '-1'"),
        ({"\u0661": "fp8"}, "expected layer numbers"),
        ({"9" * 5000: "fp8"}, "expected layer numbers"),
        (["fp8"], "expected recipes by layer number"),
    ],
)
def test_mixes_that_no_cache_holds(layers: object, match: str, tmp_path: Path) -> None:
    refused(edits.copy_with(kv_export("nvfp4"), tmp_path / "bad", [_mixed(layers)]), match)


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
def test_megatron_names_and_scales(tmp_path: Path, recipe: str) -> None:
    """``self_attn.k_scale``, which for NVFP4 is amax / 2688: the same plan as from Hugging Face's names."""
    folder = kv_export(recipe)
    share = 448 / RANGE[recipe]

    def rename(tensors: edits.Tensors) -> None:
        for name in [name for name in tensors if name.endswith(("k_scale", "v_scale"))]:
            tensors[re.sub(r"[kv]_proj\.", "", name)] = tensors.pop(name) * share

    megatron = plan(edits.copy_with(folder, tmp_path / "megatron", [edits.edit_tensors(rename)]))
    usual = plan(folder)
    assert megatron is not None
    assert usual is not None
    assert megatron.source.endswith(f"scales read as amax / {RANGE[recipe]:g}")
    for name, layer in usual.layers.items():
        # The share was multiplied in float32.
        assert megatron.layers[name].k_scale == pytest.approx(layer.k_scale, rel=2e-7)
        assert megatron.layers[name].v_scale == pytest.approx(layer.v_scale, rel=2e-7)


@pytest.mark.parametrize("recipe", CAST_PRESETS)
def test_cast_presets_store_no_scales(recipe: str) -> None:
    found = plan(cast_export(recipe))
    assert found is not None
    assert found.source == "hf_quant_config.json, no scales stored, amax 448"
    assert found.layer(7).k_scale == 448 / RANGE[recipe]


@pytest.mark.parametrize("recipe", PRESETS)
def test_by_flag_on_a_model_without_one(tmp_path: Path, recipe: str) -> None:
    flag = f"modelopt_{recipe}"
    if "affine" in recipe:
        with pytest.raises(ModelOptExtError, match="expected a recipe without biases"):
            kv_cache_plan(tmp_path, None, flag)
        return
    found = kv_cache_plan(tmp_path, None, flag)
    assert found is not None
    assert found.layer(3).v_scale == 448 / RANGE[number_format(recipe)]


@pytest.mark.parametrize("flag", ["auto", "bf16", "fp8_e5m2", "nvfp4"])
def test_what_is_sglangs_own_business(tmp_path: Path, flag: str) -> None:
    assert kv_cache_plan(tmp_path, None, flag) is None
    if flag == "bf16":
        assert plan(kv_export("nvfp4_affine"), flag) is None


@pytest.mark.parametrize(
    ("recipe", "flag"),
    [
        ("fp8", "modelopt_nvfp4"),
        ("fp8", "modelopt_fp8_affine"),
        ("fp8_affine", "modelopt_fp8"),
        ("fp8_affine", "fp8_e4m3"),
        ("fp8", "fp8_e5m2"),
        ("nvfp4", "fp8_e4m3"),
        ("nvfp4", "fp4_mx_block16"),
        ("nvfp4_affine", "nvfp4"),
        ("nvfp4_affine", "modelopt_nvfp4"),
        ("nvfp4_affine", "modelopt_nvfp4_rotate"),
    ],
)
def test_flags_that_contradict_the_checkpoint(recipe: str, flag: str) -> None:
    refused(kv_export(recipe), rf"--kv-cache-dtype: expected auto, modelopt_{recipe}.* or bf16 .*, got {flag}", flag)


@pytest.mark.parametrize(("recipe", "flag"), [("fp8", "fp8_e4m3"), ("nvfp4", "nvfp4")])
def test_sglangs_own_names_of_the_plain_caches(recipe: str, flag: str) -> None:
    found = plan(kv_export(recipe), flag)
    assert found is not None
    assert found.recipe.name == recipe
    assert found.layers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("recipe", PRESETS)
def test_scales(tmp_path: Path, recipe: str, side: str, value: float) -> None:
    change = edits.map_tensors(f"*1.self_attn.{side}_proj.{side}_scale", lambda t: torch.full_like(t, value))
    folder = edits.copy_with(kv_export(recipe), tmp_path / "bad", [change])
    refused(folder, rf"model.safetensors: model.layers.1.self_attn.{side}_proj.{side}_scale: expected finite, positive")


@pytest.mark.parametrize("recipe", ["fp8_affine", "nvfp4_affine"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t * float("nan"), "expected finite values, got nan"),
        (lambda t: t[0, :, 0], r"expected shape \[1, KV heads, 1, head_dim\], got \[2, 64\]"),
        (lambda t: t[:, :1].clone(), r"k_bias: expected shape \[1, 2, 1, 64\], got \[1, 1, 1, 64\]"),
        (lambda t: t[..., :32].clone(), r"k_bias: expected shape \[1, 2, 1, 64\], got \[1, 2, 1, 32\]"),
        (lambda t: t.to(torch.float8_e4m3fn), "expected 16-bit or 32-bit floats"),
        (lambda t: t.to(torch.int32), "expected 16-bit or 32-bit floats"),
    ],
)
def test_biases(tmp_path: Path, recipe: str, change: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    folder = edits.copy_with(
        kv_export(recipe), tmp_path / "bad", [edits.map_tensors("*0.self_attn.k_proj.k_bias", change)]
    )
    refused(folder, message)


@pytest.mark.parametrize(
    ("recipe", "pattern", "message"),
    [
        ("nvfp4", "*1.self_attn.v_proj.v_scale", "layers.1.self_attn: v_scale: expected one for every attention layer"),
        ("nvfp4", "*1.self_attn.*_scale", "layers.1.self_attn: k_scale: expected one for every attention layer"),
        ("fp8_affine", "*0.self_attn.v_proj.v_bias", "layers.0.self_attn: v_bias: expected one for every"),
        ("nvfp4_affine", "*_bias", "layers.0.self_attn: k_bias: expected one for every attention layer"),
        ("nvfp4_affine", "*_proj.[kv]_*", "kv_cache_quant_algo: expected k_bias and v_bias tensors for it, got none"),
    ],
)
def test_missing_tensors(tmp_path: Path, recipe: str, pattern: str, message: str) -> None:
    refused(edits.copy_with(kv_export(recipe), tmp_path / "bad", [edits.drop_tensors(pattern)]), message)


def test_biases_nobody_declared(tmp_path: Path) -> None:
    bias = {"model.layers.0.self_attn.k_proj.k_bias": torch.zeros(1, 2, 1, 64)}
    folder = edits.copy_with(kv_export("nvfp4"), tmp_path / "bad", [edits.add_tensors(bias)])
    refused(folder, "k_proj.k_bias: expected no biases for NVFP4, got one")


def test_scales_of_more_than_one_value(tmp_path: Path) -> None:
    change = edits.map_tensors("*0.self_attn.k_proj.k_scale", lambda t: t.expand(2).clone())
    refused(
        edits.copy_with(kv_export("fp8"), tmp_path / "bad", [change]), r"k_scale: expected one value, got shape \[2\]"
    )


@pytest.mark.parametrize("algo", ["INT8", "FP4_SOMETHING"])
def test_unknown_algorithms(tmp_path: Path, algo: str) -> None:
    change = [edits.set_file_config({"kv_cache_quant_algo": algo}), edits.drop_embedded_config]
    refused(
        edits.copy_with(kv_export("fp8"), tmp_path / "bad", change),
        "kv_cache_quant_algo: expected null or one of FP8, NVFP4",
    )


def test_head_dim_of_no_whole_block(tmp_path: Path) -> None:
    change = [edits.set_fields("config.json", {"head_dim": 72})]
    refused(edits.copy_with(kv_export("nvfp4"), tmp_path / "bad", change), "head_dim: expected a multiple of 16")


def test_latent_attention_is_left_to_sglang(tmp_path: Path) -> None:
    change = [edits.set_fields("config.json", {"kv_lora_rank": 512})]
    assert plan(edits.copy_with(kv_export("fp8"), tmp_path / "latent", change)) is None
