"""Kinds of storage that are not served: one line for each, of the cause."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_modelopt_ext.checkpoint.unserved import read_for_serving
from tests.support import edits
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir

W4A8 = "W4A8_NVFP4_FP8_CFG"


@pytest.fixture(scope="module")
def folder() -> Path:
    return export(model_dir(TinyModel("llama")), W4A8)


def problems(folder: Path) -> list[str]:
    return [str(error) for error in read_for_serving(folder)[1]]


def pack(tensors: edits.Tensors) -> None:
    """Store the experts of each layer in one tensor, under a name that ModelOpt does not export."""
    for layer in (0, 1):
        base = f"model.layers.{layer}.mlp"
        for name in edits.matching(tensors, f"{base}.*_proj.*"):
            del tensors[name]
        tensors[f"{base}.experts.w2"] = torch.zeros(4, 128, 256, dtype=torch.uint8)
        tensors[f"{base}.experts.w2_weight_scale"] = torch.zeros(4, 16, 256).to(torch.float8_e4m3fn)
        tensors[f"{base}.experts.w2_weight_scale_2"] = torch.ones(())


CASES: dict[str, tuple[list[edits.Edit], str]] = {
    "packed experts": (
        [edits.edit_tensors(pack)],
        "model.layers.0.mlp.experts.w2: expected a quantized tensor for each expert, got all experts of "
        "model.layers.0.mlp.experts packed in one",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_line_is_of_the_cause(case: str, folder: Path, tmp_path: Path) -> None:
    changes, expected = CASES[case]
    found = problems(edits.copy_with(folder, tmp_path / "model", changes))
    assert expected in found[0]
    assert "\n" not in found[0]


def test_one_line_for_a_kind(folder: Path, tmp_path: Path) -> None:
    """One line stands for the packed experts of every layer."""
    found = problems(edits.copy_with(folder, tmp_path / "model", [edits.edit_tensors(pack)]))
    assert len([line for line in found if "packed in one" in line]) == 1


def test_what_is_served_has_none(folder: Path) -> None:
    assert problems(folder) == []


MTP: dict[str, tuple[str, str]] = {
    "fused": ("self_attn.o_proj", "self_attn.qkv_proj"),
    "a shard alone": ("self_attn.q_proj", "self_attn.q_proj"),
    "one expert's projection": ("mlp.up_proj", "mlp.experts.3.up_proj"),
}


@pytest.mark.parametrize("place", ["mtp.layers.0", "model.layers.2"])
@pytest.mark.parametrize("case", MTP)
def test_an_mtp_block_that_is_not_served_may_be_anything(case: str, place: str, folder: Path, tmp_path: Path) -> None:
    old, new = MTP[case]

    def block(tensors: edits.Tensors) -> None:
        for name in edits.matching(tensors, f"*.layers.0.{old}.*"):
            tensors[name.replace(f"model.layers.0.{old}", f"{place}.{new}")] = tensors[name].clone()
        tensors[f"{place}.mlp.down_proj.input_scale"] = torch.ones(3)  # of no layer, and of no such shape

    changes = [edits.edit_tensors(block), edits.set_fields("config.json", {"num_nextn_predict_layers": 1})]
    assert problems(edits.copy_with(folder, tmp_path / "model", changes)) == []
    if place == "model.layers.2":  # where nobody declared it, it is a layer like the others
        bad = edits.copy_with(tmp_path / "model", tmp_path / "bad", [])
        edits.set_fields("config.json", {"num_nextn_predict_layers": 0})(bad)
        assert problems(bad)


class TestScalesThatAreNotNeeded:
    """Activations that are not rounded have no scale, and a checkpoint may lack it."""

    def lacking(self, target: Path, pattern: str) -> Path:
        folder = export(model_dir(TinyModel("qwen3_moe", intermediate=128)), "NVFP4_DEFAULT_CFG")
        return edits.copy_with(folder, target, [edits.drop_tensors(pattern)])

    @pytest.mark.parametrize("pattern", ["*.layers.1.mlp.experts.3.*.input_scale", "*.input_scale"])
    def test_the_rest_is_read_without_them(self, pattern: str, tmp_path: Path) -> None:
        folder = self.lacking(tmp_path / "model", pattern)
        checkpoint, found = read_for_serving(folder, rounds_fp4=False)
        assert found == []
        assert {linear.scheme.activation for linear in checkpoint.linears.values()} == {None}
        kept = [name for name in checkpoint.tensors if name.endswith(".input_scale")]
        assert all(checkpoint.leaves_out(name) for name in kept)
        assert not any(checkpoint.leaves_out(name) for name in checkpoint.tensors if name not in kept)

    def test_they_are_an_error_where_they_are_used(self, tmp_path: Path) -> None:
        folder = self.lacking(tmp_path / "model", "*.layers.1.mlp.experts.3.up_proj.input_scale")
        found = problems(folder)
        assert "model.layers.1.mlp.experts.3.up_proj.input_scale: expected a tensor of NVFP4" in found[0]

    def test_a_whole_checkpoint_keeps_them(self) -> None:
        folder = export(model_dir(TinyModel("llama")), "NVFP4_DEFAULT_CFG")
        checkpoint, found = read_for_serving(folder, rounds_fp4=False)
        assert found == []
        assert all(linear.scheme.activation is not None for linear in checkpoint.linears.values())

    def test_other_scales_stay_needed(self, folder: Path, tmp_path: Path) -> None:
        bad = edits.copy_with(folder, tmp_path / "model", [edits.drop_tensors("*1.mlp.down_proj.input_scale")])
        assert "down_proj.input_scale: expected a tensor" in str(read_for_serving(bad, rounds_fp4=False)[1][0])
