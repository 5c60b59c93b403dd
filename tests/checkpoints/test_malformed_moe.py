"""Mixtures whose experts do not fit together are an error that names them; ModelOpt's own exports are described whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sglang_modelopt_ext.checkpoint.experts import check_shared
from sglang_modelopt_ext.checkpoint.reader import check_all_values, read_checkpoint
from sglang_modelopt_ext.errors import ModelOptExtError
from tests.support import edits
from tests.support.exports import export
from tests.support.models import MOE_FAMILIES, Family, model_dir
from tests.support.moe import EXPERTS, mixed_checkpoint, swap_format, tiny, unquantize

W4A8 = "W4A8_NVFP4_FP8_CFG"
NAMES = {
    ("qwen3_moe", W4A8): ("mlp", ("gate_proj", "up_proj", "down_proj")),
    ("mixtral", W4A8): ("block_sparse_moe", ("w1", "w3", "w2")),
    ("mixtral", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"): ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
"""The names ModelOpt 0.47 gives experts."""


@pytest.mark.parametrize(("family", "recipe"), NAMES)
def test_both_naming_schemes(family: Family, recipe: str) -> None:
    block, projections = NAMES[family, recipe]
    checkpoint = read_checkpoint(export(model_dir(tiny(family)), recipe))
    check_all_values(checkpoint)
    assert set(checkpoint.experts) == {f"layers.{layer}.{block}.experts" for layer in range(2)}
    for layer in checkpoint.experts.values():
        assert (layer.projections, layer.count) == (projections, EXPERTS)
        assert (layer.hidden, layer.intermediate) == (256, 256)
        assert layer.gate_up == layer.down


def test_projections_may_differ(tmp_path: Path) -> None:
    """Gate and up in one format and down in another are two products, each whole."""
    folder = mixed_checkpoint("qwen3_moe", tmp_path / "mixed")
    swap_format(folder, "down_proj", range(EXPERTS))
    layer = read_checkpoint(folder).experts["layers.0.mlp.experts"]
    assert [scheme.algo for scheme in layer.schemes] == ["W4A8_NVFP4_FP8", "MXFP8"]
    assert layer.is_uniform


def test_experts_may_differ(tmp_path: Path) -> None:
    """Experts of one product in several formats, unquantized ones last."""
    folder = mixed_checkpoint("qwen3_moe", tmp_path / "mixed")
    swap_format(folder, "down_proj", range(2, 3))
    unquantize(folder, "*.0.*.experts.0.down_proj")
    layer = read_checkpoint(folder).experts["layers.0.mlp.experts"]
    assert [(one.scheme.algo, one.numbers) for one in layer.down] == [
        ("W4A8_NVFP4_FP8", (1, 3)),
        ("MXFP8", (2,)),
        ("unquantized", (0,)),
    ]
    assert [one.numbers for one in layer.gate_up] == [None]
    assert not layer.is_uniform
    with pytest.raises(ModelOptExtError, match="all in one format, beside a fused shared expert"):
        check_shared(layer, {})


def test_gate_and_up_of_an_expert_have_one_format(tmp_path: Path) -> None:
    folder = mixed_checkpoint("qwen3_moe", tmp_path / "mixed")
    swap_format(folder, "up_proj", range(EXPERTS))
    with pytest.raises(
        ModelOptExtError, match=r"experts\.0\.up_proj\.weight: expected W4A8_NVFP4_FP8, as .*, got MXFP8"
    ):
        read_checkpoint(folder)


def dequantize(pattern: str, shape: tuple[int, ...] = (256, 256), dtype: torch.dtype = torch.bfloat16) -> edits.Edit:
    """Turn layers into unquantized ones that the configuration still calls quantized."""

    def change(tensors: edits.Tensors) -> None:
        for name in edits.matching(tensors, f"{pattern}.weight"):
            module = name.removesuffix(".weight")
            for part in [part for part in tensors if part.startswith(module + ".")]:
                del tensors[part]
            tensors[name] = torch.zeros(shape, dtype=dtype)

    return edits.edit_tensors(change)


def add_bias(tensors: edits.Tensors) -> None:
    for name in [name for name in tensors if name.endswith(("experts.1.down_proj.weight", "experts.1.w2.weight"))]:
        tensors[name.replace("weight", "bias")] = torch.zeros(256, dtype=torch.bfloat16)


def rename_experts(tensors: edits.Tensors) -> None:
    for name in [name for name in tensors if ".experts.1.down_proj." in name]:
        tensors[name.replace("down_proj", "w2")] = tensors.pop(name)


FAULTS: dict[str, tuple[edits.Edit, str]] = {
    "a scale missing": (
        edits.drop_tensors("*.0.*.experts.2.[uw][p3]*.weight_scale_2"),
        r"experts\.2\.(up_proj|w3)\.weight_scale_2: expected a tensor of W4A8_NVFP4_FP8",
    ),
    "a projection missing": (
        edits.drop_tensors("*.1.*.experts.2.[dw][o2]*"),
        r"experts\.2\.(down_proj|w2)\.weight: expected an expert beside .*, got none",
    ),
    "an expert missing": (
        edits.drop_tensors("*.1.*.experts.1.*"),
        r"experts\.1\.(gate_proj|w1)\.weight: expected an expert beside .*, got none",
    ),
    "the last expert of a layer missing": (
        edits.drop_tensors("*.1.*.experts.3.*"),
        r"layers\.1\..*\.experts: expected 4 experts, as model\.layers\.0\..*, got 3",
    ),
    "an unquantized expert of another size": (
        dequantize("*.0.*.experts.1.[dw][o2]*", (128, 256)),
        r"experts\.1\.(down_proj|w2)\.weight: expected N, K = \[256, 256\], as .*, got \[128, 256\]",
    ),
    "an unquantized expert that is no matrix": (
        dequantize("*.0.*.experts.1.[dw][o2]*", (256, 16, 16)),
        r"experts\.1\.(down_proj|w2)\.weight: expected W4A8_NVFP4_FP8, as .*, or an unquantized matrix, got .*\[256, 16, 16\]",
    ),
    "an unquantized expert of integers": (
        dequantize("*.0.*.experts.1.[dw][o2]*", dtype=torch.int32),
        r"experts\.1\.(down_proj|w2)\.weight: expected W4A8_NVFP4_FP8, as .*, or an unquantized matrix, got torch.int32",
    ),
    "a gate that is not quantized": (
        dequantize("*.0.*.experts.0.[gw][a1]*"),
        r"experts\.0\.(up_proj|w3)\.weight: expected unquantized, as .*, got W4A8_NVFP4_FP8",
    ),
    "a bias": (
        edits.edit_tensors(add_bias),
        r"experts\.0\.(down_proj|w2)\.bias: expected a tensor, as .*experts\.1\.(down_proj|w2) has, got none|"
        r"experts\.1\.(down_proj|w2)\.bias: expected a tensor",
    ),
    "an expert of another size": (
        edits.edit_tensors(lambda tensors: _halve(tensors)),
        r"experts\.1\.(down_proj|w2)\.weight: expected N, K = \[256, 256\], as .*, got \[128, 256\]",
    ),
    "a scale that is no number": (
        edits.map_tensors("*.0.*.experts.3.[gw][a1]*.input_scale", lambda t: torch.full_like(t, float("nan"))),
        r"experts\.3\.(gate_proj|w1)\.input_scale: expected finite, positive",
    ),
}


def _halve(tensors: edits.Tensors) -> None:
    for name in [
        name for name in tensors if re.search(r"layers\.0\..*experts\.1\.(down_proj|w2)\.weight(_scale)?$", name)
    ]:
        tensors[name] = tensors[name][:128].clone()


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path: Path, fault: str, family: Family) -> None:
    change, message = FAULTS[fault]
    folder = edits.copy_with(export(model_dir(tiny(family)), W4A8), tmp_path / "checkpoint", [change])
    with pytest.raises(ModelOptExtError, match=message):
        check_all_values(read_checkpoint(folder))


def test_names_of_two_schemes(tmp_path: Path) -> None:
    change = edits.edit_tensors(rename_experts)
    folder = edits.copy_with(export(model_dir(tiny("qwen3_moe")), W4A8), tmp_path / "checkpoint", [change])
    with pytest.raises(
        ModelOptExtError, match=r"experts\.0: expected experts with gate_proj, up_proj, down_proj or w1, w3, w2"
    ):
        read_checkpoint(folder)
