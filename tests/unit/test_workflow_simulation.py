"""ModelOpt's simulation, made again from what a checkpoint records, beside the decoded export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.workflow.quantize.recipes import Changes
from sglang_modelopt_ext.workflow.quantize.record import read_record
from sglang_modelopt_ext.workflow.quantize.run import Options, quantize
from sglang_modelopt_ext.workflow.verify.run import Served, Verification, verify
from sglang_modelopt_ext.workflow.verify.simulation import objection
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir, random_ids
from tests.support.reference import Reference

MODEL = TinyModel(dtype="float32", hidden=128, intermediate=256, heads=2, kv_heads=1)
WINDOWS = [random_ids(24, seed=300 + i, vocab=511) for i in range(6)]
CLOSE = 1e-4
"""Median |difference|: float32 against float64 is some 1e-6, and a layer of other scales moves every token by hundredths."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("\n".join(f"def square_{i}():\n    return {i} * {i}  # {i * i}" for i in range(60)))
    return file


def made(output: Path, recipe: str, data: Path, changes: Changes | None = None) -> Path:
    chosen = Options(
        recipe=recipe, changes=changes or Changes(), data=(str(data),), samples=6, sequence_length=32, device="cpu"
    )
    assert quantize(str(model_dir(MODEL)), output, chosen, progress=False) is not None
    return output


def compared(folder: Path, simulate: bool = True) -> Verification:
    model = Reference(folder)
    rows = [model.logprobs(window)[:-1].numpy() for window in WINDOWS]
    served = Served("http://test", str(folder), torch.float32, "auto", rows, rows[0])
    return verify(folder, served, WINDOWS, Device.cpu(), base=model_dir(MODEL), simulate=simulate, progress=False)


@pytest.mark.parametrize("recipe", ["FP8_DEFAULT", "FP8_PER_CHANNEL_PER_TOKEN", "INT8_DEFAULT"])
def test_what_was_exported_is_what_was_simulated(recipe: str, data: Path, tmp_path: Path) -> None:
    found = compared(made(tmp_path / "made", recipe, data))
    assert found.simulated is not None, found.notes
    assert found.simulated.median_abs_logprob < CLOSE, found.simulated
    assert not any("simulation" in note for note in found.notes)


def test_calibrated_mxfp4_is_simulated_by_its_stored_scale(data: Path, tmp_path: Path) -> None:
    """ModelOpt scales the input by its stored calibration, not by each token or batch."""
    folder = made(tmp_path / "made", "W4A8_MXFP4_FP8", data, Changes(algorithm="max"))
    record = read_record(folder)
    assert record is not None
    assert {group.activation for group in record.formats} == {"fp8_static"}
    found = compared(folder)
    assert found.failures == []
    assert found.simulated is not None, found.notes
    assert found.simulated.median_abs_logprob < CLOSE, found.simulated


def test_what_the_export_changes_shows(data: Path, tmp_path: Path) -> None:
    """ModelOpt exports the layers that servers fuse under one global scale, which it does not simulate."""
    found = compared(made(tmp_path / "made", "NVFP4_DEFAULT", data))
    assert found.failures == []
    assert found.simulated is not None
    assert found.simulated.median_abs_logprob > 100 * CLOSE


def test_other_data_is_not_what_it_was_calibrated_on(data: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text(data.read_text())
    folder = made(tmp_path / "made", "FP8_DEFAULT", own)
    own.write_text(data.read_text().replace("square", "cube"))
    found = compared(folder)
    assert found.simulated is None
    assert any("simulation: not compared" in note and "calibration: expected" in note for note in found.notes)
    own.unlink()
    assert any("simulation: not compared" in note and "own.txt" in note for note in compared(folder).notes)


def test_what_cannot_be_simulated_is_said(data: Path, tmp_path: Path) -> None:
    cached = made(tmp_path / "made", "FP8_DEFAULT", data, Changes(kv="fp8"))
    assert objection(cached) == "its KV cache is quantized"
    raw = export(model_dir(MODEL), "FP8_DEFAULT_CFG")
    assert objection(raw) == "the checkpoint has no record of how it was made"
    assert compared(raw, simulate=False).notes == []
    assert compared(raw).notes == [f"ModelOpt's simulation: not compared, {objection(raw)}"]
