"""The devices this package tells apart: NVIDIA GPUs by their compute capability, CPUs, and every other accelerator."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from sglang_modelopt_ext.errors import ModelOptExtError

CAPABILITIES = (80, 86, 87, 89, 90, 100, 103, 120, 121)
"""Compute capabilities, times ten, of the NVIDIA GPUs that users may name: from SM80 on, before which no kernel is written."""


@dataclass(frozen=True)
class Device:
    """A kind of processor that may serve a layer.

    Attributes:
        kind: ``cuda`` for an NVIDIA GPU, ``cpu``, or ``other`` for any accelerator that this package has no kernels for.
        capability: an NVIDIA GPU's compute capability times ten (90 for 9.0), None otherwise.
        accelerator: PyTorch's name of another accelerator (``xpu``, ``npu``, ``rocm`` for its HIP build), empty otherwise.
    """

    kind: Literal["cpu", "cuda", "other"]
    capability: int | None = None
    accelerator: str = ""

    def __post_init__(self) -> None:
        if (self.kind == "cuda") != (self.capability is not None) or (self.kind == "other") != bool(self.accelerator):
            raise ValueError(f"a device of kind {self.kind} with {self.capability=} and {self.accelerator=}")

    @classmethod
    def cpu(cls) -> Device:
        """Return the device that stands for every CPU."""
        return cls("cpu")

    @classmethod
    def cuda(cls, capability: int) -> Device:
        """Return the NVIDIA GPUs of compute capability ``capability`` (times ten)."""
        return cls("cuda", capability)

    @classmethod
    def other(cls, accelerator: str) -> Device:
        """Return the accelerator of that name, neither a CPU nor an NVIDIA GPU."""
        return cls("other", None, accelerator)

    @classmethod
    def of(cls, device: torch.device | str) -> Device:
        """Return the device that tensors on ``device`` are computed on.

        Args:
            device: PyTorch's device, or the name of one (``cuda:1``), of which the PyTorch at hand need not know the type.

        Raises:
            RuntimeError: ``device`` is a GPU that is not there.
        """
        kind, _, index = str(device).partition(":")
        if kind == "cpu":
            return cls.cpu()
        if kind != "cuda":
            return cls.other(kind)
        # PyTorch calls AMD's GPUs cuda, too, and gives them capabilities such as (9, 4).
        if torch.version.hip is not None:
            return cls.other("rocm")
        major, minor = torch.cuda.get_device_capability(int(index) if index else None)
        return cls.cuda(10 * major + minor)

    @classmethod
    def here(cls) -> Device:
        """Return this machine's: its current GPU or other accelerator where PyTorch finds one, else its CPU."""
        if torch.cuda.is_available():
            return cls.of("cuda")
        found = torch.accelerator.current_accelerator(check_available=True)
        return cls.cpu() if found is None else cls.of(found)

    @classmethod
    def parse(cls, name: str, flag: str = "--gpu") -> Device:
        """Return the device of that name: ``cpu``, or an NVIDIA GPU as ``sm90``, ``SM90``, ``sm_90``, ``sm90a`` or ``90``.

        Args:
            name: the name, in any case.
            flag: the argument of the command line it was given for, named in the error.

        Raises:
            ModelOptExtError: no device of :data:`CAPABILITIES` is called so.
        """
        if name.lower() == "cpu":
            return cls.cpu()
        found = re.fullmatch(r"(?:sm_?)?(\d+)a?", name.lower())
        if found is None or int(found.group(1)) not in CAPABILITIES:
            known = ", ".join(device.flag for device in NAMED[:-1])
            raise ModelOptExtError.at("command line", flag, f"cpu or one of {known}", name)
        return cls.cuda(int(found.group(1)))

    @property
    def name(self) -> str:
        """The name in messages and tables: ``SM90``, ``CPU``, or an accelerator's such as ``rocm``."""
        if self.kind == "cuda":
            return f"SM{self.capability}"
        return self.accelerator or "CPU"

    @property
    def flag(self) -> str:
        """The name in lower case, as :meth:`parse` reads it: ``sm90``, ``cpu``."""
        return self.name.lower()

    def at_least(self, capability: int) -> bool:
        """Return whether it is an NVIDIA GPU of that compute capability (times ten) or a later one."""
        return self.capability is not None and self.capability >= capability

    def before(self, capability: int) -> bool:
        """Return whether it is an NVIDIA GPU of an earlier compute capability (times ten)."""
        return self.capability is not None and self.capability < capability

    def is_one_of(self, *capabilities: int) -> bool:
        """Return whether it is an NVIDIA GPU of one of these compute capabilities (times ten)."""
        return self.capability in capabilities


NAMED = (*(Device.cuda(capability) for capability in CAPABILITIES), Device.cpu())
"""The devices that users may name."""
