"""Scores of what is served: layers computed from their export while a search runs, against the export that it ends with."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("modelopt")

from sglang_modelopt_ext.checkpoint.quant_config import canonical_name
from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
from sglang_modelopt_ext.cli.main import main
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.workflow.autoquant.decoded import decoded, decoded_choice, quantized
from sglang_modelopt_ext.workflow.autoquant.formats import find_formats
from sglang_modelopt_ext.workflow.autoquant.search import Search
from sglang_modelopt_ext.workflow.autoquant.state import UNQUANTIZED, Report, read_report
from sglang_modelopt_ext.workflow.common.base_model import load_model
from sglang_modelopt_ext.workflow.verify.reference import DecodedLinear
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir
from tests.unit.test_autoquant_run import arguments, failure, texts

FORMATS = "W4A8_NVFP4_FP8,FP8,NVFP4"


@pytest.fixture(scope="module")
def model() -> Path:
    return model_dir(TinyModel(layers=2))


@pytest.fixture(scope="module")
def searched(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a search scored as exported, with three formats in its choice."""
    output = tmp_path_factory.mktemp("decoded") / "out"
    assert main(arguments(model, output, "--scored-as", "export", formats=FORMATS, bits="5.2")) == 0
    return output


def simulated(model: Path, report: Report) -> Search:
    """Return the search of a report up to its choice, with ModelOpt's quantizers in the model."""
    fake, _ = load_model(model, "cpu", progress=False)
    calibration, _, _ = texts(model)
    (result,) = report.results
    return Search(
        model=fake,
        method="gradient",
        groups=report.state.groups,
        formats=find_formats(FORMATS.split(","), "cpu"),
        calibration=calibration.batches(),
        scoring=None,
        checkpoint=None,
        pick=lambda: result.choice.formats,
        device="cpu",
    )


@pytest.mark.parametrize("target", ["sm90", "sm100"])
def test_layers_compute_what_the_export_stores(searched: Path, model: Path, target: str) -> None:
    """Each layer of the quantized model, against the layer read from the checkpoint's files: to the bit, but for a rounding.

    The weight is decoded to float32 and rounded to the model's type here, and kept in float32 there: 2^-9 of each product.
    """
    report = read_report(searched / "autoquant.json")
    (result,) = report.results
    search = simulated(model, report)
    search.run()
    device = Device.parse(target)
    schemes = {candidate.name: candidate.scheme for candidate in search.formats}
    checkpoint = read_checkpoint(searched)
    modules = dict(search.model.named_modules())
    checked = set()
    with decoded_choice(search.model, report.state.groups, result.choice.formats, schemes, device), torch.no_grad():
        for group in report.state.groups:
            chosen = result.choice.formats[group.name]
            for layer in group.layers if chosen != UNQUANTIZED else ():
                expected = DecodedLinear(checkpoint.linears[canonical_name(layer.name)], device, torch.float32)
                x = torch.randn(40, layer.k, generator=torch.Generator().manual_seed(layer.n)).to(torch.bfloat16)
                got, wanted = modules[layer.name](x).float(), expected(x.float())
                error = float((got - wanted).norm() / wanted.norm())
                assert error < 2**-7, (layer.name, chosen, error)
                checked.add(chosen)
    assert len(checked) == 3, "every format"
    layer = report.state.groups[0].layers[0]
    assert "forward" not in vars(modules[layer.name].weight_quantizer), "ModelOpt's simulation is back"


@pytest.mark.parametrize(
    "preset",
    [
        "NVFP4_DEFAULT_CFG",
        "W4A16_NVFP4_CFG",
        "W4A8_NVFP4_FP8_CFG",
        "W4A8_MXFP4_FP8_CFG",
        "MXFP4_DEFAULT_CFG",
        "MXFP8_DEFAULT_CFG",
        "FP8_DEFAULT_CFG",
        "FP8_PER_CHANNEL_PER_TOKEN_CFG",
        "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
        "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
        "INT8_DEFAULT_CFG",
        "INT8_WEIGHT_ONLY_CFG",
    ],
)
def test_every_format_is_decoded_as_it_is_exported(preset: str, model: Path) -> None:
    """The weights of the first layer, fused ones with the scales that they share, against ModelOpt's whole export."""
    import modelopt.torch.quantization as mtq

    checkpoint = read_checkpoint(export(model, preset))
    quantized_model, _ = load_model(model, "cpu", progress=False)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        mtq.quantize(quantized_model, copy.deepcopy(getattr(mtq, preset)), lambda m: m(ids))
    names = [name for name in checkpoint.linears if name.startswith("layers.0.")]
    layers = [quantized(f"model.{name}", quantized_model.get_submodule(f"model.{name}")) for name in names]
    assert len(layers) == 7
    (scheme,) = {linear.scheme for linear in checkpoint.linears.values()}
    with decoded(layers, scheme, Device.parse("sm100")):
        for name, layer in zip(names, layers, strict=True):
            got = layer.module.weight_quantizer(layer.module.weight).float()
            expected = DecodedLinear(checkpoint.linears[name], Device.parse("sm100"), torch.float32).matrix
            assert float((got - expected).norm() / expected.norm()) < 2**-8, name  # rounded to the model's type


def test_what_is_scored_is_recorded_and_differs(searched: Path, model: Path, tmp_path: Path) -> None:
    """On SM90 FP4 activations are served unrounded, so that NVFP4 costs less than W4A8 there; ModelOpt simulates their rounding."""
    output = tmp_path / "simulation"
    assert main(arguments(model, output, "--no-export", formats=FORMATS, bits="5.2")) == 0
    served, simulation = (read_report(folder / "autoquant.json") for folder in (searched, output))
    assert (served.state.scored_as, simulation.state.scored_as) == ("export", "simulation")
    for ours, theirs in zip(served.state.groups, simulation.state.groups, strict=True):
        at = {name: (ours.candidates[name].score or 0, theirs.candidates[name].score or 0) for name in ours.candidates}
        nvfp4, w4a8 = at["NVFP4_DEFAULT_CFG"], at["W4A8_NVFP4_FP8_CFG"]
        assert nvfp4[0] < w4a8[0], "sixteen weights to a scale instead of 32, and no rounding of inputs"
        assert nvfp4[1] > w4a8[1], "simulated, the rounding of inputs to four bits costs most"
        assert at["FP8_DEFAULT_CFG"][0] == pytest.approx(at["FP8_DEFAULT_CFG"][1], rel=0.3)


@pytest.mark.parametrize(
    ("formats", "match"),
    [("FP8,NVFP4_AWQ", "--scored-as: NVFP4_AWQ_LITE_CFG: expected formats without smoothing")],
)
def test_formats_that_are_not_decoded(
    formats: str, match: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(model, tmp_path / "out", "--scored-as", "export", formats=formats)
    assert match in failure(capsys, argv)
