"""The unquantized model is put where ``--device`` says, and whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common import modelopt_cpu
from sglang_modelopt_ext.workflow.common.base_model import ALL_GPUS, check_on_gpus, device_map, load_model
from tests.support.models import model_dir
from tests.support.quantizing import SMALL, calibration_file, run


@pytest.fixture(scope="module")
def model() -> Path:
    """Return a tiny random Llama with a tokenizer."""
    return model_dir(SMALL)


def test_all_gpus_of_a_machine_without_one_are_its_cpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loaded, simulation = load_model(model, ALL_GPUS, progress=False)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert simulation == modelopt_cpu.NAME


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cpu", None), ("cuda", {"": "cuda"}), ("cuda:1", {"": "cuda:1"}), (ALL_GPUS, "auto")],
)
def test_where_transformers_puts_it(device: str, expected: Any) -> None:
    assert device_map(device) == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_that_the_gpus_do_not_hold(device: str) -> None:
    """What accelerate keeps on the CPU has its parameters on the meta device between two calls."""
    model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 2, device=device))
    line = r"^here: model: expected room for all of its weights on the GPUs, or --device cpu, got none for 1.weight and others$"
    with pytest.raises(ModelOptExtError, match=line):
        check_on_gpus(model, "here")


@pytest.mark.gpu
def test_one_gpu_holds_it(model: Path) -> None:
    check_on_gpus(load_model(model, "cuda", progress=False)[0], model)


@pytest.mark.gpu
def test_all_gpus_quantize_as_one_does(model: Path, tmp_path: Path) -> None:
    data = calibration_file(tmp_path)
    one, every = (
        load_file(run(model, tmp_path / device, data, device=device).exported.folder / "model.safetensors")
        for device in ("cuda", ALL_GPUS)
    )
    assert one.keys() == every.keys()
    assert all(torch.equal(tensor.view(torch.uint8), every[name].view(torch.uint8)) for name, tensor in one.items())
