"""The metadata that this package records in its exports, and ModelOpt's simulation on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from sglang_modelopt_ext.checkpoint.quant_config import OWN_KEY
from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
from sglang_modelopt_ext.env import MXFP4_ACTIVATIONS
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common import modelopt_cpu
from sglang_modelopt_ext.workflow.evaluate.measure import assumptions
from sglang_modelopt_ext.workflow.quantize.run import Options, quantize
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


MXFP4_BITS = {"num_bits": "e2m1", "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": "e8m0"}}


def recipe_file(folder: Path, rounded: tuple[str, ...]) -> str:
    """Return a recipe with MXFP4 MLPs beside FP8 attention; the inputs of the layers ``rounded`` are rounded."""
    fp8 = {"num_bits": "e4m3", "axis": None}
    entries: list[dict[str, object]] = [{"quantizer_name": "*", "enable": False}]
    entries += [{"quantizer_name": f"*self_attn*{side}_quantizer", "cfg": fp8} for side in ("weight", "input")]
    entries += [{"quantizer_name": "*mlp*weight_quantizer", "cfg": MXFP4_BITS}]
    entries += [{"quantizer_name": f"*{name}*input_quantizer", "cfg": MXFP4_BITS} for name in rounded]
    file = folder / "mine.yaml"
    content = {"metadata": {"recipe_type": "ptq"}, "quantize": {"algorithm": "max", "quant_cfg": entries}}
    file.write_text(yaml.safe_dump(content))
    return str(file)


@pytest.mark.parametrize("rounds", [True, False])
def test_mxfp4_layers_of_a_mix_are_read_as_they_were_made(tmp_path: Path, rounds: bool) -> None:
    """The record is of them, whatever the FP8 layers beside them do."""
    data = tmp_path / "text.txt"
    data.write_text("import os\nprint(os.getcwd())\n" * 200)
    options = Options(
        recipe_file(tmp_path, ("mlp",) if rounds else ()),
        data=(str(data),),
        samples=4,
        sequence_length=32,
        device="cpu",
    )
    done = quantize(str(model_dir(TinyModel())), tmp_path / "out", options, progress=False)
    assert done is not None
    record = done.exported.record
    assert record.rounds_activations is rounds
    assert {(group.algo, group.activation) for group in record.formats} == {
        ("FP8", "fp8_static"),
        ("MXFP4", "mxfp4_dynamic" if rounds else "none"),
    }


def test_a_mix_that_no_export_tells_apart_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("x = 1\n" * 200)
    recipe = recipe_file(tmp_path, ("layers.0.mlp",))
    options = Options(recipe, data=(str(data),), samples=4, sequence_length=32, device="cpu")
    with pytest.raises(ModelOptExtError, match=r"expected MXFP4 layers that all round their inputs or none"):
        quantize(str(model_dir(TinyModel())), tmp_path / "out", options, progress=False)
    assert not (tmp_path / "out").exists()


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
