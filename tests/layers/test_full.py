"""Slow tests layer by layer: every recipe on held-out models, and a real AutoQuantize mix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_modelopt_ext.device import Device
from tests.layers import test_recipes
from tests.layers.test_recipes import RECIPES, check_layers
from tests.support.exports import calibration_tokens, export
from tests.support.models import TinyModel, model_dir

pytestmark = pytest.mark.full

SEARCHED = (
    "W4A8_NVFP4_FP8",
    "W4A8_MXFP4_FP8",
    "W4A8_AWQ",
    "INT4_AWQ",
    "INT4_BLOCKWISE_WEIGHT_ONLY",
    "NVFP4",
    "NVFP4_FOUR_OVER_SIX",
    "NVFP4_AWQ_CLIP",
    "NVFP4_AWQ",
    "NVFP4_AWQ_FULL",
    "W4A16_NVFP4",
    "MXFP4",
    "MXFP8",
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY",
    "INT8",
    "INT8_SMOOTHQUANT",
    "INT8_WEIGHT_ONLY",
)
"""Formats that ``auto-quantize`` can mix."""

mxfp4_rounds_activations = test_recipes.mxfp4_rounds_activations


@pytest.mark.parametrize("recipe", RECIPES)
def test_held_out_models(recipe: str) -> None:
    """A seed and sizes no other test uses, Mistral among them."""
    spec = TinyModel("mistral", seed=4321, hidden=384, intermediate=640, heads=6, kv_heads=3, layers=1)
    check_layers(export(model_dir(spec), recipe))


def test_auto_quantize(tmp_path: Path) -> None:
    """ModelOpt's own search: FP8, NVFP4_AWQ with smoothing and W4A8_NVFP4_FP8 by layer."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
    from sglang_modelopt_ext.workflow.common import modelopt_cpu

    modelopt_cpu.install("cpu")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir(TinyModel()), dtype="auto").eval()
    batches = [{"input_ids": tokens, "labels": tokens} for tokens in calibration_tokens(512, 0)]
    model, _ = mtq.auto_quantize(
        model,
        constraints={"effective_bits": 6.0},
        quantization_formats=[mtq.W4A8_NVFP4_FP8_CFG, mtq.FP8_DEFAULT_CFG, mtq.NVFP4_AWQ_LITE_CFG],
        data_loader=batches,
        forward_step=lambda model, batch: model(**batch),
        # The loss of so small a model underflows in the search's scores.
        loss_func=lambda output, batch: output.loss * 1000,
        num_calib_steps=4,
        num_score_steps=4,
        disabled_layers=["*lm_head*"],
    )
    folder = tmp_path / "mixed"
    export_hf_checkpoint(model, export_dir=folder)
    algos = {linear.scheme.algo for linear in read_checkpoint(folder).linears.values()}
    assert len(algos) > 1
    check_layers(folder)


def test_every_format_in_one_mix(tmp_path: Path) -> None:
    """Each format a search may choose from, side by side in one export: read strictly, served as the reference decodes it."""
    from sglang_modelopt_ext.workflow.autoquant.formats import find_formats
    from sglang_modelopt_ext.workflow.autoquant.layers import plan_groups, read_linears
    from sglang_modelopt_ext.workflow.autoquant.rules import Rules
    from sglang_modelopt_ext.workflow.autoquant.search import Search
    from sglang_modelopt_ext.workflow.common.base_model import load_model
    from sglang_modelopt_ext.workflow.quantize.export import export_checkpoint
    from sglang_modelopt_ext.workflow.quantize.record import Origin

    source = model_dir(TinyModel(layers=5))
    model, simulation = load_model(source, "cpu", progress=False)
    formats = find_formats(SEARCHED, "cpu")
    _, groups, _ = plan_groups(read_linears(source), formats, Device.cpu(), Rules(), [row.name for row in formats])
    chosen = {group.name: formats[index % len(formats)] for index, group in enumerate(groups)}
    assert len(groups) >= len(formats)
    Search(
        model=model,
        method="gradient",
        groups=groups,
        formats=formats,
        calibration=[tokens for batch in calibration_tokens(512, 0)[:2] for tokens in batch.split(1)],
        scoring=None,
        checkpoint=None,
        pick=lambda: {name: candidate.name for name, candidate in chosen.items()},
        device="cpu",
    ).run()
    origin = Origin(recipe="mix", base_model=str(source), algorithm=(), calibration=None, simulation=simulation)
    exported = export_checkpoint(model, source, tmp_path / "out", origin, progress=False)
    for group in groups:
        for layer in group.layers:
            linear = exported.checkpoint.linears[layer.name.removeprefix("model.")]
            assert linear.scheme.algo == chosen[group.name].scheme.algo
            stored = 8 * sum(tensor.num_bytes for tensor in linear.stored.values())
            cost = chosen[group.name].cost(layer, torch.bfloat16)
            assert cost is not None
            # The smoothing of AWQ may be folded into a norm: 16 bits for each input.
            assert cost - 16 * layer.k <= stored <= cost, f"{layer.name}: {chosen[group.name].name}"
    check_layers(exported.folder)
