"""LoRA adapters on a served quantized model, on a CPU with a stand-in for the pinned memory that SGLang's wrappers allocate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import save_file

from tests.serving.checks import FP32_MEDIAN, SHORT_PROMPTS, check_logprobs
from tests.support import stand_ins
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir
from tests.support.reference import Reference, difference
from tests.support.server import Server

pytestmark = [pytest.mark.server, pytest.mark.full]

MXFP4, NVFP4 = "W4A8_MXFP4_FP8_CFG", "W4A8_NVFP4_FP8_CFG"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 16


class Adapted(torch.nn.Module):
    """A linear layer and the product of an adapter added to it."""

    def __init__(self, base: torch.nn.Module, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.base, self.down, self.up = base, down, up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``base(x) + alpha / rank * x A^T B^T``, with ``x`` unrounded in the second term (PEFT's definition)."""
        added: torch.Tensor = self.base(x) + ALPHA / RANK * (x @ self.down.T @ self.up.T)
        return added


class AdaptedServer(Server):
    """A server whose requests name an adapter, None for none."""

    adapter: str | None = None

    def request(self, path: str, payload: dict[str, Any] | None) -> Any:
        if path == "/generate" and payload is not None and self.adapter is not None:
            payload = {**payload, "lora_path": self.adapter}
        return super().request(path, payload)


def make_adapter(folder: Path, reference: Reference) -> Path:
    """Write an adapter in PEFT's format for every linear layer of the decoder, and add it to ``reference``."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in reference.weights.items():
        down = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        # As large as the layer's own product, so that an adapter that is left out or misplaced moves every token.
        up = torch.randn(weight.shape[0], RANK, generator=generator) * weight.std() * weight.shape[1] ** 0.5 / RANK
        tensors |= {f"base_model.model.{name}.lora_{side}.weight": t for side, t in (("A", down), ("B", up))}
        reference.model.set_submodule(name, Adapted(reference.model.get_submodule(name), down, up))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "bias": "none"}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(("recipe", "tp"), [(MXFP4, 1), (NVFP4, 2)])
def test_an_adapter_on_every_layer(recipe: str, tp: int, tmp_path: Path) -> None:
    """With it, every layer's product has the adapter's added; requests without it are served as without LoRA."""
    folder = export(model_dir(TinyModel("llama")), recipe)
    reference = Reference(folder)
    adapter = make_adapter(tmp_path / "adapter", reference)
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
