"""SGLang's side of a KV cache's scales without a server: its launching process and its loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.integration.kv import hooks as kv_hooks
from sglang_modelopt_ext.integration.kv import scales as kv_scales
from tests.support import edits

Weights = list[tuple[str, torch.Tensor]]


class Runtime:
    """SGLang's state in a scheduler: the resolved flag, and the arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import sglang.srt.runtime_context as context
        from sglang.srt.model_loader import loader

        self.model = SimpleNamespace(kv_cache_dtype="auto", model_checksum=None)
        self.args: Any = None
        for module in (context, loader):
            monkeypatch.setattr(module, "get_model", lambda: self.model)
            monkeypatch.setattr(module, "get_server_args", lambda: self.args)
        monkeypatch.setattr(Device, "here", lambda: Device.cuda(90))

    def start(self, model_path: Path | str, flag: str = "auto", **fields: Any) -> None:
        """Resolve the arguments of a server on a GPU, like the launching process."""
        from sglang.srt.arg_groups.overrides import resolved_view
        from sglang.srt.server_args import ServerArgs

        self.args = ServerArgs(model_path=str(model_path), kv_cache_dtype=flag, **{"device": "cuda", **fields})
        kv_hooks.declare(self.args)
        self.model.kv_cache_dtype = resolved_view(self.args).kv_cache_dtype

    def load(self, model: torch.nn.Module, model_path: Path | str, stored: Weights, **config: Any) -> list[str]:
        """Return the names of the tensors that ``model`` gets in a scheduler."""
        from sglang.srt.configs.load_config import LoadConfig

        def original(loader: Any, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
            yield from stored

        fields = {"model_path": str(model_path), "revision": None, "quantization": None, **config}
        model_config = SimpleNamespace(**fields)
        loader = SimpleNamespace(load_config=LoadConfig())
        return [name for name, _ in kv_scales._get_all_weights(original, loader, model_config, model)]


def weights(folder: Path) -> Weights:
    return sorted(edits.read_tensors(folder).items())


def plain_names(folder: Path) -> list[str]:
    return [name for name, _ in weights(folder) if not name.endswith(("k_scale", "v_scale", "_bias"))]
