"""LoRA adapters on a served quantized model, on a CPU with a stand-in for the pinned memory that SGLang's wrappers allocate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from tests.serving.checks import FP32_MEDIAN, SHORT_PROMPTS, check_logprobs
from tests.support import stand_ins
from tests.support.adapters import add_adapter, make_adapter
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir
from tests.support.reference import Reference, difference
from tests.support.server import Server

pytestmark = [pytest.mark.server, pytest.mark.full]

MXFP4, NVFP4 = "W4A8_MXFP4_FP8_CFG", "W4A8_NVFP4_FP8_CFG"


class AdaptedServer(Server):
    """A server whose requests name an adapter, None for none."""

    adapter: str | None = None

    def request(self, path: str, payload: dict[str, Any] | None) -> Any:
        if path == "/generate" and payload is not None and self.adapter is not None:
            payload = {**payload, "lora_path": self.adapter}
        return super().request(path, payload)


@pytest.mark.parametrize(("recipe", "tp"), [(MXFP4, 1), (NVFP4, 2)])
def test_an_adapter_on_every_layer(recipe: str, tp: int, tmp_path: Path) -> None:
    """With it, every layer's product has the adapter's added; requests without it are served as without LoRA."""
    folder = export(model_dir(TinyModel("llama")), recipe)
    reference = Reference(folder)
    adapter = make_adapter(tmp_path / "adapter", reference.weights)
    add_adapter(reference, adapter)
    variables = stand_ins.environment(tmp_path)
    args = ("--lora-paths", f"it={adapter}", "--lora-backend", "torch_native")
    with AdaptedServer(folder, dtype="float32", tp=tp, args=args, env=variables) as server:
        check_logprobs(server, folder, "float32")
        server.adapter = "it"
        served = torch.cat([server.full_logprobs(ids) for ids in SHORT_PROMPTS])
        expected = torch.cat([reference.logprobs(ids) for ids in SHORT_PROMPTS])
        assert difference(served, expected).median < FP32_MEDIAN
        server.adapter = None
        without = torch.cat([server.full_logprobs(ids) for ids in SHORT_PROMPTS])
        assert difference(without, expected).median > 0.1, "the adapter changes too little to be seen"
        refused = requests.post(
            f"{server.url}/update_weights_from_disk", json={"model_path": str(folder)}, timeout=120
        ).json()
        assert not refused["success"]
        assert "--enable-lora: expected a server without LoRA adapters" in refused["message"]
        check_logprobs(server, folder, "float32")
