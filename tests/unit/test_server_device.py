"""The device that decides about a server: that of its arguments, in every process, and not the machine's alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.integration import config, devices, processes

HOPPER, ROCM = Device.cuda(90), Device.other("rocm")


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_settled", None)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)


def machine(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setattr(Device, "here", lambda: device)


@pytest.mark.parametrize(
    ("named", "here", "found"),
    [
        (None, HOPPER, HOPPER),
        ("cuda", HOPPER, HOPPER),
        ("cuda:1", HOPPER, HOPPER),
        ("cpu", HOPPER, Device.cpu()),
        ("cpu", ROCM, Device.cpu()),
        ("cuda", ROCM, ROCM),
        (None, ROCM, ROCM),
        ("npu", Device.cpu(), Device.other("npu")),
        ("xpu:0", HOPPER, Device.other("xpu")),
        (None, Device.cpu(), Device.cpu()),
    ],
)
def test_the_flag_decides_and_the_machine_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, named: str | None, here: Device, found: Device
) -> None:
    machine(monkeypatch, here)
    assert devices.device_of(SimpleNamespace(device=named)) == found


def test_sglangs_variable_for_cpus_counts_where_no_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, HOPPER)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert devices.device_of(SimpleNamespace(device=None)) == Device.cpu()
    assert devices.device_of(SimpleNamespace(device="cuda")) == HOPPER


def test_processes_of_a_server_use_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang.srt.runtime_context as context

    machine(monkeypatch, HOPPER)
    assert devices.server_device() == HOPPER, "a process of no server"
    monkeypatch.setattr(context, "get_server_args", lambda: SimpleNamespace(device="cpu"))
    assert devices.server_device() == Device.cpu(), "a scheduler, where SGLang publishes the arguments"
    devices.settle(SimpleNamespace(device="cuda"))
    assert devices.server_device() == HOPPER, "the launching process, which settles them"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that SGLang serves rightly on a Hopper GPU, and on no CPU."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    content = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(("named", "family"), [(None, None), ("cuda", None), ("cpu", "modelopt_ext")])
def test_a_cpu_server_on_a_machine_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch, folder: Path, named: str | None, family: str | None
) -> None:
    """Before the server starts, and where SGLang then builds its configuration of the model, in either process."""
    import sglang.srt.runtime_context as context
    from sglang.srt.server_args import ServerArgs

    machine(monkeypatch, HOPPER)
    args = ServerArgs(model_path=str(folder), device=named, load_format="dummy")
    owners: list[Any] = []
    monkeypatch.setattr(processes, "report", owners.append)
    processes.preflight(args)
    assert [owner.family for owner in owners] == [family]
    assert _verified(folder) == family
    monkeypatch.setattr(devices, "_settled", None)  # a scheduler
    monkeypatch.setattr(context, "get_server_args", lambda: args)
    assert _verified(folder) == family


def _verified(folder: Path) -> str | None:
    model = SimpleNamespace(model_path=str(folder), revision=None, quantization=None)
    config._verify_quantization(lambda model: None, model)  # type: ignore[arg-type]
    return model.quantization
