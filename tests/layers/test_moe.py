"""Mixtures of experts, layer by layer: SGLang's own fused experts, loaded from real exports, against an independent reading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("sglang")

from sglang_modelopt_ext.env import MXFP4_ACTIVATIONS
from tests.layers.moe_harness import NAMES, build, run
from tests.layers.test_recipes import FLIP_TOLERANCE, layer_inputs, relative_error
from tests.support.exports import export
from tests.support.models import MOE_FAMILIES, Family, TinyModel, model_dir
from tests.support.reference import Reference

RECIPES = (
    "W4A8_NVFP4_FP8_CFG",
    "W4A8_MXFP4_FP8_CFG",
    "NVFP4_DEFAULT_CFG",
    "NVFP4_EXPERTS_ONLY_CFG",
    "NVFP4_MLP_WEIGHT_ONLY_CFG",
    "MXFP4_DEFAULT_CFG",
    "MXFP8_DEFAULT_CFG",
    "FP8_DEFAULT_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT8_SMOOTHQUANT_CFG",
    "INT8_WEIGHT_ONLY_CFG",
)

EXPERTS, TOP_K = 4, 2


def tiny(family: Family) -> TinyModel:
    return TinyModel(family, intermediate=256, experts=EXPERTS, top_k=TOP_K)


@pytest.fixture(autouse=True)
def mxfp4_rounds_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MXFP4_ACTIVATIONS.variable, "mxfp4")


def routing(tokens: int, experts: int = EXPERTS, top_k: int = TOP_K) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts for each token, and weights that sum to one."""
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, chosen = scores.topk(top_k, dim=-1)
    return chosen, weights / weights.sum(dim=-1, keepdim=True)


def expert_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


def common(name: str) -> str:
    return name.replace(NAMES["mixtral"][0], "mlp")


def check_experts(folder: Path, dtype: torch.dtype = torch.float32, tolerance: float = FLIP_TOLERANCE) -> None:
    """Every layer of experts of the checkpoint against the reference's."""
    model, checkpoint = build(folder, dtype=dtype)
    reference = Reference(folder).model
    layers = expert_layers(model)
    assert len(layers) == len(checkpoint.experts) > 0
    for name, layer in layers.items():
        x = layer_inputs(layer.hidden_size, dtype)
        chosen, weights = routing(len(x), layer.num_experts, layer.top_k)
        y = run(layer, x, chosen, weights)
        assert y.dtype == dtype
        error = relative_error(y, reference.get_submodule(common(name))(x.float(), chosen, weights))
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_recipe(recipe: str, family: Family) -> None:
    check_experts(export(model_dir(tiny(family)), recipe))
