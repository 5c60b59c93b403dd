"""LoRA adapters in PEFT's format on every quantized layer of a decoder, and their definition in a reading of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.reference import Reference

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 16
_PREFIX = "base_model.model."


class Adapted(torch.nn.Module):
    """A linear layer and the product of an adapter added to it."""

    def __init__(self, base: torch.nn.Module, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.base, self.down, self.up = base, down, up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``base(x) + alpha / rank * x A^T B^T``, with ``x`` unrounded in the second term (PEFT's definition)."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        added: torch.Tensor = self.base(x) + ALPHA / RANK * (x @ down.T @ up.T)
        return added


def make_adapter(folder: Path, weights: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Path:
    """Write a random adapter for layers of these names and weights to the new ``folder``, and return it."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        down = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        # As large as the layer's own product, so that an adapter that is left out or misplaced moves every token.
        up = torch.randn(weight.shape[0], RANK, generator=generator) * weight.std() * weight.shape[1] ** 0.5 / RANK
        tensors |= {f"{_PREFIX}{name}.lora_{side}.weight": t.to(dtype) for side, t in (("A", down), ("B", up))}
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "bias": "none"}
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def add_adapter(reference: Reference, folder: Path) -> None:
    """Add the adapter in ``folder`` to a reading."""
    tensors = load_file(folder / "adapter_model.safetensors", device=str(torch.get_default_device()))
    for name in reference.weights:
        down, up = (tensors[f"{_PREFIX}{name}.lora_{side}.weight"] for side in "AB")
        reference.model.set_submodule(name, Adapted(reference.model.get_submodule(name), down, up))
