"""Every tensor of every recipe, spoiled in every way its declaration forbids, raises an error that names it.

Driven by the formats' own declarations: a new recipe or format is covered as soon as tests/layers lists its preset.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("sglang")

from sglang_modelopt_ext.checkpoint.reader import check_all_values, read_checkpoint, standard_name
from sglang_modelopt_ext.env import MXFP4_ACTIVATIONS
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_kernels.formats.base import TensorSpec, ValueRule
from tests.layers.test_recipes import RECIPES
from tests.support import edits
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir

LAYER = "layers.1.mlp.down_proj"

ILLEGAL: dict[ValueRule, tuple[float, ...]] = {
    ValueRule.POSITIVE: (float("nan"), float("inf"), 0.0, -1.0),
    ValueRule.FINITE: (float("nan"),),
    ValueRule.BLOCK_SCALE_E4M3: (float("nan"), -1.0),
    ValueRule.BLOCK_SCALE_UE8M0: (255,),
    ValueRule.CODES: (),
}


@pytest.fixture(autouse=True)
def mxfp4_rounds_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MXFP4_ACTIVATIONS.variable, "mxfp4")


def refused(tmp_path: Path, source: Path, change: edits.Edit, named: str, case: str) -> None:
    """Check that the checkpoint with ``change`` raises an error that names ``named``."""
    folder = edits.copy_with(source, tmp_path / re.sub(r"\W+", "-", case), [change])
    with pytest.raises(ModelOptExtError, match=re.escape(named)):
        check_all_values(read_checkpoint(folder))


def other_dtype(spec: TensorSpec) -> torch.dtype:
    """Return a type the tensor must not have."""
    return next(dtype for dtype in (torch.float64, torch.int32) if dtype not in spec.dtypes)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_tensor_of_a_layer(tmp_path: Path, recipe: str) -> None:
    source = export(model_dir(TinyModel()), recipe)
    linear = read_checkpoint(source).linears[LAYER]
    for spec in linear.scheme.tensors:
        name = linear.stored[spec.name].name
        standard = standard_name(name)
        # A layer that loses its smoothing is a legal layer without one; its absence is only wrong beside a shard that has it.
        if spec.name != "pre_quant_scale":
            refused(tmp_path, source, edits.drop_tensors(name), standard, f"{spec.name} dropped")
        refused(tmp_path, source, edits.retype_tensors(name, other_dtype(spec)), name, f"{spec.name} retyped")
        # A weight that is the only tensor along N decides it alone; the model's own sizes refuse it when layers are built.
        alone = spec.name == "weight" and sum(other.dim_of("N") is not None for other in linear.scheme.tensors) == 1
        if spec.dims and not alone:
            longer = edits.map_tensors(
                name, lambda t: torch.cat([t.view(torch.uint8), t.view(torch.uint8)]).view(t.dtype)
            )
            # The weight decides the layer's sizes: doubled, it is the next tensor that does not fit.
            refused(tmp_path, source, longer, linear.name, f"{spec.name} too long")
        for value in ILLEGAL[spec.values]:
            spoil = edits.map_tensors(name, lambda t, v=value: _with(t, v))
            refused(tmp_path, source, spoil, name, f"{spec.name} {value}")


def _with(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """Return ``tensor`` with its last entry replaced."""
    flat = tensor.flatten().clone()
    if tensor.dtype == torch.float8_e4m3fn:
        flat = flat.float()
    flat[-1] = value
    return flat.to(tensor.dtype).reshape(tensor.shape)


@pytest.mark.parametrize("recipe", ["NVFP4_SVDQUANT_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG"])
def test_smoothing_on_some_shards_of_a_fused_layer(tmp_path: Path, recipe: str) -> None:
    source = export(model_dir(TinyModel()), recipe)
    name = "model.layers.0.self_attn.k_proj.pre_quant_scale"
    with pytest.raises(ModelOptExtError, match=rf"{re.escape(name)}: expected a tensor, as .* it is fused with"):
        read_checkpoint(edits.copy_with(source, tmp_path / "checkpoint", [edits.drop_tensors(name)]))
