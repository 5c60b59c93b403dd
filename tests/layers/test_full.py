"""Layer by layer, what takes longer: every recipe on held-out models, and a real AutoQuantize mix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.layers import test_recipes
from tests.layers.test_recipes import RECIPES, check_layers
from tests.support.exports import calibration_tokens, export
from tests.support.models import TinyModel, model_dir

pytestmark = pytest.mark.full

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
    from sglang_modelopt_ext.workflow import modelopt_cpu

    modelopt_cpu.install()
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
