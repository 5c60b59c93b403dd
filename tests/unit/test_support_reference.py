"""The reference reads exports right, and notices when anything in them is read wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.edits import (
    Edit,
    Tensors,
    add_tensors,
    copy_with,
    distinct_shard_scales,
    drop_embedded_config,
    drop_file_config,
    drop_tensors,
    edit_tensors,
    map_tensors,
    read_tensors,
    scale_tensors,
    set_config,
    shard,
)
from tests.support.models import FAMILIES, random_ids
from tests.support.recipes import FP4_VALUES, decode_fp4, to_e4m3
from tests.support.reference import Reference, difference

NVFP4 = "W4A8_NVFP4_FP8_CFG"
MXFP4 = "W4A8_MXFP4_FP8_CFG"
RECIPES = (NVFP4, MXFP4)
PROMPTS = [random_ids(length, seed) for seed, length in enumerate((5, 17, 32, 48))]
Builder = Callable[..., Path]
SHARDS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def logprobs(reference: Reference) -> torch.Tensor:
    return torch.cat([reference.logprobs(ids) for ids in PROMPTS])


def ones(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(tensor)


def all_alike(tensor: torch.Tensor) -> torch.Tensor:
    """Replace every block scale by the middle one."""
    return torch.full_like(tensor.float(), float(tensor.float().median())).to(tensor.dtype)


def reversed_along_k(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8).flip(1).contiguous().view(tensor.dtype)


def largest_of_the_shards(suffix: str) -> Callable[[Tensors], None]:
    """Replace the scales of a fused layer by the largest of its shards, like a careless reader."""

    def change(tensors: Tensors) -> None:
        for first, *others in SHARDS:
            for name in [name for name in tensors if name.endswith(f".{first}.{suffix}")]:
                names = [name, *(name.replace(first, other) for other in others)]
                largest = torch.stack([tensors[n] for n in names]).max()
                tensors.update({n: largest.clone() for n in names})

    return change


def test_fp4_codes_low_nibble_first():
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76], [0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    decoded = decode_fp4(packed)
    assert decoded[0].tolist() == list(FP4_VALUES)
    assert decoded[1].tolist() == [-value for value in FP4_VALUES]


def test_e4m3_saturates_and_rounds_ties_to_even():
    x = torch.tensor([1e9, -449.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10])
    assert to_e4m3(x).tolist() == [448.0, -448.0, 16.0, 20.0, 0.0, 2 * 2.0**-9]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoded_weights_are_the_nearest_codes(tiny_model: Builder, tiny_export: Builder, family, recipe):
    """Each weight is the code nearest to the original under its block scale; all are as near as 4 bits allow."""
    folder = tiny_export(recipe, family)
    original, stored = read_tensors(tiny_model(family)), read_tensors(folder)
    weights = Reference(folder).weights
    assert len(weights) == 14
    for name, weight in weights.items():
        source = original[f"{name}.weight"].float()
        error = (weight - source).abs()
        assert 0.05 < error.norm() / source.norm() < 0.16, name
        scales = stored[f"{name}.weight_scale"]
        if recipe == NVFP4:
            steps = scales.float() * stored[f"{name}.weight_scale_2"]
        else:
            steps = torch.exp2(scales.float() - 127)
        step = steps.repeat_interleave(32, dim=1)
        codes = torch.tensor(FP4_VALUES)
        nearest = (source.abs().unsqueeze(-1) - codes * step.unsqueeze(-1)).abs().amin(dim=-1)
        # ModelOpt divides in bf16 before it rounds.
        assert ((error - nearest) / step).max() < 0.04, name


IGNORED: list[tuple[str, str, Edit]] = [
    (NVFP4, "input_scale", map_tensors("*.input_scale", ones)),
    (NVFP4, "input_scale of a single layer", map_tensors("*layers.0.self_attn.o_proj.input_scale", ones)),
    (NVFP4, "weight_scale_2", map_tensors("*.weight_scale_2", ones)),
    (NVFP4, "weight_scale_2 of a single layer", map_tensors("*layers.1.mlp.down_proj.weight_scale_2", ones)),
    (NVFP4, "weight_scale_2 off by a twentieth", scale_tensors({"*.v_proj.weight_scale_2": 1.05})),
    (NVFP4, "block scales", map_tensors("*.weight_scale", all_alike)),
    (NVFP4, "block scales of a single layer", map_tensors("*layers.1.mlp.up_proj.weight_scale", all_alike)),
    (NVFP4, "order of block scales", map_tensors("*layers.1.self_attn.v_proj.weight_scale", reversed_along_k)),
    (NVFP4, "order of nibbles", map_tensors("*layers.1.mlp.down_proj.weight", lambda t: (t >> 4) | (t << 4))),
    (MXFP4, "block scales", map_tensors("*.weight_scale", all_alike)),
    (MXFP4, "block scales of a single layer", map_tensors("*layers.1.mlp.up_proj.weight_scale", all_alike)),
    (MXFP4, "order of block scales", map_tensors("*layers.1.self_attn.v_proj.weight_scale", reversed_along_k)),
    (MXFP4, "order of nibbles", map_tensors("*layers.1.mlp.down_proj.weight", lambda t: (t >> 4) | (t << 4))),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("recipe", "what", "edit"), IGNORED, ids=[f"{row[0][:10]}-{row[1]}".replace(" ", "_") for row in IGNORED]
)
def test_nothing_can_be_ignored(tiny_export: Builder, tmp_path: Path, family, recipe, what, edit):
    """A correct float32 reader has a median of 1e-5."""
    folder = tiny_export(recipe, family)
    wrong = copy_with(folder, tmp_path / "wrong", [edit])
    apart = difference(logprobs(Reference(wrong)), logprobs(Reference(folder)))
    assert apart.median > 0.3, str(apart)
    assert apart.mean > 0.1, str(apart)


@pytest.mark.parametrize("suffix", ["weight_scale_2", "input_scale"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_keep_their_own_scales(tiny_export: Builder, tmp_path: Path, family, suffix):
    folder = copy_with(tiny_export(NVFP4, family), tmp_path / "distinct", [distinct_shard_scales])
    wrong = copy_with(folder, tmp_path / "wrong", [edit_tensors(largest_of_the_shards(suffix))])
    apart = difference(logprobs(Reference(wrong)), logprobs(Reference(folder)))
    assert apart.median > 0.3, str(apart)


@pytest.mark.parametrize("recipe", RECIPES)
def test_variations_of_the_arithmetic(tiny_export: Builder, recipe):
    """Each differs from the recipe, except that MXFP4 weights are exact in E4M3."""
    folder = tiny_export(recipe)
    expected = logprobs(Reference(folder))
    for activation in ("none", "per_tensor"):
        assert difference(logprobs(Reference(folder, activation=activation)), expected).mean > 0.05, activation
    fp8 = difference(logprobs(Reference(folder, math="fp8")), expected)
    assert fp8.largest == 0.0 if recipe == MXFP4 else fp8.mean > 0.05


@pytest.mark.parametrize("recipe", RECIPES)
def test_float32_is_precise_enough(tiny_export: Builder, recipe):
    """With the rest of the model in float64 most rows do not move; see Difference about those that do."""
    folder = tiny_export(recipe)
    apart = difference(logprobs(Reference(folder, dtype=torch.float64)), logprobs(Reference(folder)))
    assert apart.median < 1e-4, str(apart)


LAYOUTS: dict[str, list[Edit]] = {
    "hf_quant_config.json only": [drop_embedded_config],
    "config.json only": [drop_file_config],
    "two files": [shard(2)],
    "three files and a duplicate": [shard(3, duplicate="*.q_proj.weight")],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_of_the_same_content(tiny_export: Builder, tmp_path: Path, layout):
    folder = tiny_export(NVFP4)
    other = copy_with(folder, tmp_path / "other", LAYOUTS[layout])
    assert torch.equal(logprobs(Reference(other)), logprobs(Reference(folder)))


@pytest.mark.parametrize("recipe", [None, *RECIPES])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read(tiny_model: Builder, tiny_export: Builder, family, tied, recipe):
    folder = tiny_export(recipe, family, tied=tied) if recipe else tiny_model(family, tied=tied)
    reference = Reference(folder)
    table = reference.logprobs(PROMPTS[1])
    assert table.shape == (len(PROMPTS[1]), 512)
    assert torch.allclose(table.exp().sum(dim=-1), torch.ones(len(PROMPTS[1])), atol=1e-5)
    assert len(reference.weights) == (14 if recipe else 0)
    scored = reference.input_logprobs(PROMPTS[1])
    assert scored[3] == table[3, PROMPTS[1][4]]
    assert reference.greedy(PROMPTS[1], 2)[0] == int(table[-1].argmax())


MALFORMED: list[tuple[str, type[Exception], Edit]] = [
    ("weight_scale_2", ValueError, drop_tensors("*.0.mlp.up_proj.weight_scale_2")),
    ("are stored", ValueError, drop_tensors("*.0.mlp.up_proj.weight_scale")),
    ("zero_point", ValueError, add_tensors({"model.layers.0.mlp.up_proj.zero_point": torch.ones(256)})),
    ("not read", ValueError, add_tensors({"model.layers.0.mlp.surplus": torch.ones(1)})),
    ("missing", ValueError, drop_tensors("model.norm.weight")),
    ("groups of 16", ValueError, set_config({"group_size": 16})),
    ("W2A2", NotImplementedError, set_config({"quant_algo": "W2A2"})),
    ("KV cache", ValueError, set_config({"kv_cache_quant_algo": "FP8"})),
]


@pytest.mark.parametrize(("message", "error", "edit"), MALFORMED, ids=[row[0] for row in MALFORMED])
def test_malformed_is_refused(tiny_export: Builder, tmp_path: Path, message, error, edit):
    folder = copy_with(tiny_export(NVFP4), tmp_path / "malformed", [edit])
    with pytest.raises(error, match=re.escape(message)):
        Reference(folder)
