"""W4A8_MXFP4_FP8 layers with and without a stored ``input_scale``, from real exports against an independent reading.

ModelOpt's preset is not calibrated and stores none; a calibration that takes these layers along, such as that of a mix with FP8
layers, leaves one in each.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang_modelopt_ext.checkpoint.reader import check_all_values, read_checkpoint
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.config import ModelOptExtConfig
from sglang_modelopt_ext.schemes.base import Scheme
from sglang_modelopt_ext.schemes.table import UMBRELLA
from tests.layers import moe_harness
from tests.layers.harness import build
from tests.layers.test_moe import check_experts, expert_layers
from tests.layers.test_recipes import (
    FLIP_TOLERANCE,
    TOLERANCE,
    _interleave,
    check_layers,
    layer_inputs,
    relative_error,
    shards_of,
)
from tests.support import edits
from tests.support.exports import Variant, export, mixed_recipe
from tests.support.models import Family, TinyModel, model_dir
from tests.support.moe import tiny
from tests.support.reference import Reference

MXFP4 = "W4A8_MXFP4_FP8_CFG"
CALIBRATED = Variant(algorithm="max")
MIX = {"*self_attn*": MXFP4, "*mlp*": "FP8_DEFAULT_CFG"}


def calibrated(family: Family = "llama") -> Path:
    return export(model_dir(TinyModel(family)), MXFP4, CALIBRATED)


def activations(folder: Path) -> dict[str, str]:
    """Return the activation format of each quantized layer."""
    found = {}
    for name, linear in read_checkpoint(folder).linears.items():
        assert linear.scheme.activation is not None
        found[name] = linear.scheme.activation.name
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_calibrated_layers_are_static(family: Family) -> None:
    folder = calibrated(family)
    assert set(activations(folder).values()) == {"fp8_static"}
    check_layers(folder)


def test_the_preset_is_dynamic() -> None:
    assert set(activations(export(model_dir(TinyModel()), MXFP4)).values()) == {"fp8_per_token"}


def test_the_two_readings_differ() -> None:
    """A layer served by the other reading of its input would fail the tests here."""
    folder = calibrated()
    static, by_token = (
        Reference(folder, activation=reading).model.get_submodule("model.layers.0.mlp.down_proj")  # type: ignore[arg-type]
        for reading in ("recipe", "per_token")
    )
    x = layer_inputs(512, torch.float32)
    assert relative_error(by_token(x), static(x)) > 3 * FLIP_TOLERANCE


def test_a_mix_calibrated_together() -> None:
    folder = export(model_dir(TinyModel()), mixed_recipe(MIX))
    checkpoint = read_checkpoint(folder)
    assert checkpoint.config.algo == "MIXED_PRECISION"
    assert {linear.scheme.algo for linear in checkpoint.linears.values()} == {"W4A8_MXFP4_FP8", "FP8"}
    assert set(activations(folder).values()) == {"fp8_static"}
    check_layers(folder)


@pytest.mark.parametrize("kv_cache", ["FP8_KV_CFG", "fp8_cast"])
@pytest.mark.parametrize("recipe", ["W4A8_MXFP4_FP8_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "MXFP8_DEFAULT_CFG"])
def test_recipes_without_calibration_beside_a_kv_cache(recipe: str, kv_cache: str, tmp_path: Path) -> None:
    """Beside a KV cache ModelOpt calibrates W4A8_MXFP4_FP8 too: static input scales are then its recipe. (The cache is cut off.)"""
    source = export(model_dir(TinyModel("qwen2")), recipe, Variant(kv_cache=kv_cache))
    no_cache = [edits.drop_embedded_config, edits.set_file_config({"kv_cache_quant_algo": None})]
    if kv_cache == "FP8_KV_CFG":
        no_cache.append(edits.drop_tensors("*.[kv]_scale"))
    folder = edits.copy_with(source, tmp_path / "checkpoint", no_cache)
    check_layers(folder)
    formats = {
        layer.scheme.activation.name for layer in read_checkpoint(folder).linears.values() if layer.scheme.activation
    }
    calibrated = any(name.endswith(".input_scale") for name in edits.read_tensors(folder))
    assert calibrated == recipe.startswith("W4A8")
    assert ("fp8_static" in formats) == calibrated


def test_each_layer_decides_for_itself(tmp_path: Path) -> None:
    """Layers with and without the scale beside each other, like in a search over formats."""
    changes = [
        edits.drop_tensors(name) for name in ("*0.mlp.down_proj.input_scale", "*1.self_attn.[qkv]_proj.input_scale")
    ]
    folder = edits.copy_with(calibrated(), tmp_path / "checkpoint", changes)
    found = activations(folder)
    by_token = {name for name, activation in found.items() if activation == "fp8_per_token"}
    assert by_token == {"layers.0.mlp.down_proj", *(f"layers.1.self_attn.{part}_proj" for part in "qkv")}
    check_layers(folder)
    model, _ = build(folder)
    served = model.get_submodule("model.layers.1.self_attn.qkv_proj")
    assert served.quant_method.scheme.describe() == "W4A8_MXFP4_FP8 (weights mxfp4, activations fp8_per_token)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check_layers(calibrated(), dtype, tolerance=FLIP_TOLERANCE + torch.finfo(dtype).eps)


def test_ranks_together_are_one() -> None:
    """A static scale needs no exchange between ranks: the layers get no group to exchange through."""
    folder = calibrated()
    whole, _ = build(folder)
    parts = [build(folder, rank, 2)[0] for rank in range(2)]
    for name, module in whole.named_modules():
        if not getattr(module, "quant_method", None):
            continue
        x = layer_inputs(module.input_size, torch.float32)
        ranks = [part.get_submodule(name) for part in parts]
        if name.endswith(("o_proj", "down_proj")):
            pairs = zip(ranks, x.chunk(2, dim=-1), strict=True)
            y = sum(layer.quant_method.apply(layer, part) for layer, part in pairs)
        else:
            y = _interleave([layer.quant_method.apply(layer, x) for layer in ranks], ranks[0].output_partition_sizes)
        assert relative_error(torch.as_tensor(y), module.quant_method.apply(module, x)) < TOLERANCE, name


def test_shards_with_scales_of_their_own(tmp_path: Path) -> None:
    """Shards whose inputs are rounded differently are computed apart."""
    change = edits.scale_tensors({"*.k_proj.input_scale": 1.7, "*.up_proj.input_scale": 0.6})
    folder = edits.copy_with(calibrated("qwen2"), tmp_path / "checkpoint", [change])
    check_layers(folder)
    layer = build(folder)[0].get_submodule("model.layers.0.mlp.gate_up_proj")
    assert len(layer.quant_method.groups) == len(shards_of("mlp.gate_up_proj"))


@pytest.mark.parametrize("shard", ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"])
def test_fused_shards_that_disagree(tmp_path: Path, shard: str) -> None:
    change = edits.drop_tensors(f"model.layers.1.{shard}.input_scale")
    folder = edits.copy_with(calibrated(), tmp_path / "checkpoint", [change])
    named = re.escape(f"layers.1.{shard}.input_scale")
    with pytest.raises(ModelOptExtError, match=rf"{named}: expected a tensor, as .*_proj it is fused with, got none"):
        read_checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_illegal_scales(tmp_path: Path, value: float) -> None:
    change = edits.map_tensors("*0.mlp.down_proj.input_scale", lambda t: torch.full_like(t, value))
    folder = edits.copy_with(calibrated(), tmp_path / "checkpoint", [change])
    with pytest.raises(ModelOptExtError, match=r"0\.mlp\.down_proj\.input_scale: expected finite, positive"):
        check_all_values(read_checkpoint(folder))


def test_a_scale_for_each_channel_is_refused(tmp_path: Path) -> None:
    change = edits.map_tensors("*0.mlp.down_proj.input_scale", lambda t: t.repeat(512))
    folder = edits.copy_with(calibrated(), tmp_path / "checkpoint", [change])
    with pytest.raises(ModelOptExtError, match=r"down_proj\.input_scale: expected shape \[\], got \[512\]"):
        read_checkpoint(folder)


def test_dummy_weights_have_no_scale() -> None:
    """Without tensors, layers are read like the preset exports them."""
    checkpoint = read_checkpoint(calibrated())
    config = ModelOptExtConfig(UMBRELLA, checkpoint.config, None)
    method = config._linear_method(torch.nn.Module(), "model.layers.0.self_attn.qkv_proj")
    assert method is not None
    assert [spec.name for spec in method.scheme.tensors] == ["weight", "weight_scale"]


def test_a_row_whose_tensors_decide_nothing() -> None:
    with pytest.raises(ValueError, match="X: no stored tensor tells fp8_per_token from fp8_static"):
        Scheme("X", ("mxfp4",), "fp8_static", UMBRELLA, static_activation="fp8_per_token")


def expert_activations(layer: Any) -> dict[str, str]:
    """Return the name of the format that each product of a layer of experts rounds its input to."""
    return {name: one.scheme.activation.name for name, (one,) in layer.quant_method.sets.items()}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts(family: Family) -> None:
    folder = export(model_dir(tiny(family)), MXFP4, CALIBRATED)
    layers = check_experts(folder)
    for layer in layers.values():
        assert set(expert_activations(layer).values()) == {"fp8_static"}


def test_experts_of_which_one_product_is_static(tmp_path: Path) -> None:
    change = edits.drop_tensors("*.down_proj.input_scale")
    source = export(model_dir(tiny("qwen3_moe")), MXFP4, CALIBRATED)
    layers = check_experts(edits.copy_with(source, tmp_path / "checkpoint", [change]))
    for layer in layers.values():
        found = expert_activations(layer)
        assert found == {"w13": "fp8_static", "w2": "fp8_per_token"}


@pytest.mark.parametrize("part", ["0.up_proj", "2.gate_proj", "3.down_proj"])
def test_experts_that_disagree(tmp_path: Path, part: str) -> None:
    change = edits.drop_tensors(f"model.layers.1.mlp.experts.{part}.input_scale")
    source = export(model_dir(tiny("qwen3_moe")), MXFP4, CALIBRATED)
    folder = edits.copy_with(source, tmp_path / "checkpoint", [change])
    named = re.escape(f"1.mlp.experts.{part}.input_scale")
    with pytest.raises(ModelOptExtError, match=rf"{named}: expected a tensor, as .* has, got none"):
        read_checkpoint(folder)


def test_dummy_experts_have_no_scale() -> None:
    folder = export(model_dir(tiny("qwen3_moe")), MXFP4, CALIBRATED)
    layer = next(iter(expert_layers(moe_harness.build(folder)[0]).values()))
    assert any(spec.name == "input_scale" for spec in layer.quant_method.sets["w13"][0].scheme.tensors)
    config = ModelOptExtConfig(UMBRELLA, read_checkpoint(folder).config, None)
    method = config._experts_method(layer, "model.layers.0.mlp.experts")
    assert method is not None
    stored = {spec.name for sets in method.sets.values() for one in sets for spec in one.scheme.tensors}
    assert stored == {"weight", "weight_scale"}
