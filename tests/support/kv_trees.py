"""Trees of modules with SGLang's attention at the places of its model classes, and checkpoints of a KV cache's tensors alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

HEAD_DIM = 16


def attention_model(layers: int = 2, heads: int = 2, scales: bool = False) -> torch.nn.Module:
    """Return a model with attention layers where SGLang's Llama has them."""
    return attention_tree([(f"model.layers.{index}.self_attn.attn", index) for index in range(layers)], heads, scales)


def attention_tree(
    places: Sequence[tuple[str, int]], heads: int = 2, scales: bool = False, others: Sequence[str] = ()
) -> torch.nn.Module:
    """Return attention layers by ``(module name, layer number)``; ``others`` are names of plain modules beside them."""
    from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
    from sglang.srt.layers.radix_attention import RadixAttention

    model = torch.nn.Module()
    for name in others:
        _put(model, name, torch.nn.Linear(1, 1))
    for name, number in places:
        attention = RadixAttention(4, HEAD_DIM, 0.25, heads, number)
        if scales:
            BaseKVCacheMethod(SimpleNamespace()).create_weights(attention)
        _put(model, name, attention)
    return model


def _put(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    *parents, last = name.split(".")
    owner = model
    for part in parents:
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    owner.add_module(last, module)


def scales_of(model: torch.nn.Module) -> dict[str, tuple[float, float]]:
    """Return ``(k_scale, v_scale)`` of every attention layer, by the module around it; -1 where none was set."""
    return {
        name.rpartition(".")[0]: (float(module.k_scale), float(module.v_scale))
        for name, module in model.named_modules()
        if hasattr(module, "k_scale")
    }


def stored_attention(module: str, k_scale: float | None, v_scale: float | None, values: bool = True) -> dict[str, Any]:
    """Return the tensors of one attention layer with a projection for keys and, with ``values``, one for values."""
    found = {f"{module}.k_proj.weight": torch.zeros(4, 4)}
    if values:
        found[f"{module}.v_proj.weight"] = torch.zeros(4, 4)
    for side, scale in (("k", k_scale), ("v", v_scale)):
        if scale is not None:
            found[f"{module}.{side}_proj.{side}_scale"] = torch.tensor(scale)
    return found


def kv_folder(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, algo: str = "FP8", exclude: Sequence[str] = (), **config: Any
) -> Path:
    """Return a checkpoint that declares a KV cache and stores ``tensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": algo, "exclude_modules": list(exclude)}
    content = {"producer": {"name": "modelopt"}, "quantization": quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 2, **config}), encoding="utf-8")
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def layers(pattern: str, numbers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return scales that identify their layer: 0.5 + n and 0.25 + n."""
    found: dict[str, torch.Tensor] = {}
    for number in numbers:
        found |= stored_attention(pattern.format(number), 0.5 + number, 0.25 + number)
    return found
