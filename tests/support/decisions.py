"""SGLang's decision about a checkpoint with and without this plugin, by SGLang's own functions, without a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers import quantization
from sglang.srt.model_loader import weight_utils
from transformers import PretrainedConfig

from sglang_modelopt_ext.checkpoint.tensors import read_json_object
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.integration import config
from sglang_modelopt_ext.schemes.table import FAMILIES

FLAGS: tuple[str | None, ...] = (None, *(flag for flag in QUANTIZATION_CHOICES if flag not in FAMILIES))
"""Every value of ``--quantization`` that SGLang has of its own, and none."""

REJECTED, UNQUANTIZED = "rejected", "unquantized"


@dataclass(frozen=True)
class Decision:
    """A decision: ``method`` is the quantization's name, :data:`REJECTED` or :data:`UNQUANTIZED`.

    ``detail``: the class that SGLang reads it with, or the reason of a rejection; not compared for a rejection.
    """

    method: str
    detail: str = ""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Decision):
            return NotImplemented
        return self.method == other.method and (self.method == REJECTED or self.detail == other.detail)

    __hash__ = None  # type: ignore[assignment]


@contextmanager
def gpu(device: Device) -> Iterator[None]:
    """Make detection see that GPU while the block runs."""
    pair = divmod(device.capability or 0, 10)
    with (
        patch.object(quantization, "cpu_has_amx_support", lambda: False),
        patch("sglang.srt.layers.quantization.moe_wna16.get_device_capability", lambda: pair),
        patch.object(config, "server_device", lambda: device),
    ):
        yield


def _model_config(folder: Path, flag: str | None) -> Any:
    found = ModelConfig.__new__(ModelConfig)
    found.hf_config = PretrainedConfig(**read_json_object(folder / "config.json"))
    found.model_path, found.revision, found.quantization = str(folder), None, flag
    found.is_draft_model = found.is_draft_quantization_explicit = False
    return found


def _decide(folder: Path, flag: str | None, device: Device, verify: Any, read: Any) -> Decision:
    model_config = _model_config(folder, flag)
    try:
        verify(model_config)
        if model_config.quantization is None:
            return Decision(UNQUANTIZED)
        found = read(model_config, LoadConfig(load_format="dummy"), {})
    except Exception as error:  # any error would keep the server from starting
        return Decision(REJECTED, f"{type(error).__name__}: {error}")
    if found is None:
        return Decision(UNQUANTIZED)
    if device.before(found.get_min_capability()):
        return Decision(REJECTED, f"{found.get_name()} from SM{found.get_min_capability()} on")
    return Decision(model_config.quantization, type(found).__name__)


def without_plugin(folder: Path, flag: str | None, device: Device) -> Decision:
    """Return SGLang's own decision about the checkpoint."""
    with gpu(device):
        return _decide(folder, flag, device, ModelConfig._verify_quantization, weight_utils.get_quant_config)


def with_plugin(folder: Path, flag: str | None, device: Device) -> Decision:
    """Return SGLang's decision under the hooks of this package."""
    stock_verify, stock_read = ModelConfig._verify_quantization, weight_utils.get_quant_config
    methods = {**quantization.QUANTIZATION_METHODS, **dict.fromkeys(FAMILIES, config.ModelOptExtConfig)}

    def verify(model_config: Any) -> None:
        config._verify_quantization(stock_verify, model_config)

    def read(*args: Any) -> Any:
        return config._get_quant_config(stock_read, *args)

    with gpu(device), patch.dict(quantization.QUANTIZATION_METHODS, methods):
        return _decide(folder, flag, device, verify, read)
