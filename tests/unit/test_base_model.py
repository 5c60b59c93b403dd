"""The unquantized model is put where ``--device`` says, and whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common import base_model, modelopt_cpu
from sglang_modelopt_ext.workflow.common.base_model import ALL_GPUS, device_map, load_model
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


def test_a_model_that_the_gpus_do_not_hold() -> None:
    """accelerate would move such a part to the GPU for each of its calls; packing and the account of weights expect them there."""
    spread: Any = SimpleNamespace(hf_device_map={"model.embed_tokens": 0, "model.layers.0": 1, "lm_head": "cpu"})
    with pytest.raises(
        ModelOptExtError, match=r"^here: model: expected room for all .* or --device cpu, got none for lm_head$"
    ):
        base_model._check_placed(spread, "here")
    for whole in ({"": 0}, {"model": 0, "lm_head": 1}):
        base_model._check_placed(SimpleNamespace(hf_device_map=whole), "here")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_all_gpus_quantize_as_one_does(model: Path, tmp_path: Path) -> None:
    data = calibration_file(tmp_path)
    one, every = (
        load_file(run(model, tmp_path / device, data, device=device).exported.folder / "model.safetensors")
        for device in ("cuda", ALL_GPUS)
    )
    assert one.keys() == every.keys()
    assert all(torch.equal(tensor.view(torch.uint8), every[name].view(torch.uint8)) for name, tensor in one.items())
