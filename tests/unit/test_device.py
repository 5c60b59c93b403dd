"""The one description of devices: names, comparisons, and what PyTorch says of the machine."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sglang_modelopt_ext.device import CAPABILITIES, Device
from sglang_modelopt_ext.errors import ModelOptExtError


def pretend(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, hip: str | None = None, other: str = ""
) -> None:
    """A machine whose PyTorch finds a GPU of that capability, or another accelerator, or nothing."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    found = torch.device(other) if other else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)


@pytest.mark.parametrize("name", ["sm90", "SM90", "sm_90", "sm90a", "90"])
def test_names_of_a_gpu(name: str) -> None:
    assert Device.parse(name) == Device.cuda(90)


def test_every_known_device_is_read_by_its_own_name() -> None:
    devices = [Device.cpu(), *(Device.cuda(capability) for capability in CAPABILITIES)]
    assert [Device.parse(device.flag) for device in devices] == devices
    assert [Device.parse(device.name) for device in devices] == devices
    assert (Device.cuda(103).name, Device.cpu().name, Device.other("npu").name) == ("SM103", "CPU", "npu")


@pytest.mark.parametrize("name", ["sm75", "sm", "", "gpu", "9.0", "rocm", "sm90b"])
def test_other_names_are_errors(name: str) -> None:
    with pytest.raises(
        ModelOptExtError, match=r"^command line: --gpu: expected cpu or one of sm80, .*sm121, got"
    ) as error:
        Device.parse(name)
    assert str(error.value).endswith(f"got {name}".strip())


def test_comparisons() -> None:
    sm89 = Device.cuda(89)
    assert [sm89.at_least(80), sm89.at_least(89), sm89.at_least(90)] == [True, True, False]
    assert [sm89.before(89), sm89.before(90)] == [False, True]
    assert [sm89.is_one_of(89, 90), sm89.is_one_of(90)] == [True, False]
    for device in (Device.cpu(), Device.other("rocm")):
        assert [device.at_least(0), device.before(1000), device.is_one_of(*CAPABILITIES)] == [False] * 3


@pytest.mark.parametrize("fields", [("cuda",), ("cpu", 90), ("other", 94, "rocm"), ("other",), ("cpu", None, "xpu")])
def test_kinds_without_what_belongs_to_them_are_errors(fields: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match="a device of kind"):
        Device(*fields)  # type: ignore[arg-type]


def test_the_machine_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    assert Device.here() == Device.of(torch.device("cuda", 0)) == Device.of("cuda:1") == Device.cuda(90)
    assert Device.of(torch.device("cpu")) == Device.cpu()
    pretend(monkeypatch, (12, 1))
    assert Device.here() == Device.cuda(121)
    pretend(monkeypatch, None)
    assert Device.here() == Device.cpu()


def test_amd_gpus_are_no_nvidia_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 4), hip="6.4")
    assert Device.here() == Device.of("cuda") == Device.other("rocm")
    assert Device.of("cpu") == Device.cpu(), "asked for on that machine"


def test_other_accelerators_are_no_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None, other="xpu")
    assert Device.here() == Device.other("xpu")
    assert Device.of("npu:0") == Device.other("npu"), "a type that this PyTorch does not know"


def test_it_imports_torch_and_the_errors_only() -> None:
    code = "import sys, sglang_modelopt_ext.device; print(*sorted(m for m in sys.modules if 'sglang' in m))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in loaded if "." in name} == {
        "sglang_modelopt_ext._version",
        "sglang_modelopt_ext.device",
        "sglang_modelopt_ext.errors",
    }
