"""What this package records in its exports, and ModelOpt's simulation on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sglang_modelopt_ext.checkpoint.quant_config import OWN_KEY
from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
from sglang_modelopt_ext.env import MXFP4_ACTIVATIONS
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow import modelopt_cpu
from sglang_modelopt_ext.workflow.evaluate import assumptions
from sglang_modelopt_ext.workflow.quantize import Options, quantize
from tests.support import edits
from tests.support.models import TinyModel, model_dir


@pytest.mark.parametrize(("recipe", "rounds"), [("MXFP4_DEFAULT", True), ("MXFP4_MLP_WEIGHT_ONLY", False)])
def test_our_own_mxfp4_exports_say_whether_they_round_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, rounds: bool
) -> None:
    folder = tmp_path / "export"
    quantize(str(model_dir(TinyModel())), folder, Options(recipe), progress=False)
    own = json.loads((folder / edits.QUANT_CONFIG).read_text())[OWN_KEY]
    assert own["recipe"] == recipe
    assert own["calibration"] is None, "nothing is run for a recipe whose scales are all dynamic"
    assert own["rounds_activations"] is rounds
    assert own["simulation"] == ("cuda" if torch.cuda.is_available() else "cpu")
    schemes = {linear.scheme.activation for linear in read_checkpoint(folder).linears.values()}
    assert all((activation is not None) == rounds for activation in schemes)
    assert assumptions(folder) == []
    monkeypatch.setenv(MXFP4_ACTIVATIONS.variable, "none" if rounds else "mxfp4")
    with pytest.raises(ModelOptExtError, match=r"as hf_quant_config\.json records, got"):
        read_checkpoint(folder)


def test_hadamard_is_its_own_inverse_and_keeps_lengths() -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    y = modelopt_cpu.hadamard_transform(x, scale=64**-0.5)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(modelopt_cpu.hadamard_transform(y, scale=64**-0.5), x)
    one = torch.zeros(4)
    one[3] = 1.0
    assert modelopt_cpu.hadamard_transform(one).tolist() == [1.0, -1.0, -1.0, 1.0]


def test_a_short_last_block_is_padded_not_dropped() -> None:
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    rounded = modelopt_cpu.dynamic_block_quantize(x, 16, x.abs().amax(), 4, 2, 8, 4)
    assert rounded.shape == x.shape
    assert float((rounded - x).norm() / x.norm()) < 0.2
    assert torch.equal(rounded[:, :32], modelopt_cpu.dynamic_block_quantize(x[:, :32], 16, x.abs().amax(), 4, 2, 8, 4))


def test_formats_nobody_exports_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="no CPU simulation"):
        modelopt_cpu.dynamic_block_quantize(torch.ones(1, 32), 32, None, 6, 3, 8, 8)
