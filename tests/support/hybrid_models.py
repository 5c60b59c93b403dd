"""Tiny models whose layers differ, and their exports with a quantized KV cache: a window in every other layer, or linear attention.

SGLang keeps the caches of the layers apart: it calls the pools of both models hybrid. It serves a Mellum on a CPU too; its kernels
for Qwen3-Next's linear attention need a GPU or AMX, and 128 channels of a head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from tests.support import models
from tests.support.cache import cached_folder, digest, source_digest
from tests.support.exports import Variant, export
from tests.support.kv_exports import PRESETS, UNQUANTIZED
from tests.support.models import TinyModel, build_tokenizer

Kind = Literal["mellum", "qwen3_next"]
WINDOW = 24
"""Keys that a token of a Mellum sees in its first layer and every other."""

ATTENTION = {"mellum": (0, 1, 2, 3), "qwen3_next": (1, 3)}
"""Numbers of the layers that have keys and values."""

_LIKE = TinyModel("qwen3", layers=4)
"""The model with the same names of layers, whose weights are taken; linear attention has its own."""


def hybrid_dir(kind: Kind, max_position: int = 2048, window: int = WINDOW) -> Path:
    """Return the folder of the Hugging Face model, made on the first call."""
    import transformers

    key = digest(
        kind, max_position, window, transformers.__version__, source_digest(Path(__file__), Path(models.__file__))
    )
    return cached_folder("models", f"{kind}-{key}", lambda folder: _save(kind, max_position, window, folder))


def hybrid_export(kind: Kind, recipe: str, max_position: int = 2048, window: int = WINDOW) -> Path:
    """Return the export of the model with that KV recipe and unquantized layers."""
    return export(hybrid_dir(kind, max_position, window), UNQUANTIZED, Variant(kv_cache=PRESETS[recipe]))


def _save(kind: Kind, max_position: int, window: int, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)  # of what the class draws itself, such as the decay of linear attention
        model = _new(kind, max_position, window)
        weights = models._Weights(_LIKE)
        for name, parameter in model.named_parameters():
            if "linear_attn" not in name:
                drawn = weights.make(name, tuple(parameter.shape))
                is_centred = kind == "qwen3_next" and "norm" in name
                parameter.copy_(drawn - 1.0 if is_centred else drawn)
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer(_LIKE.vocab).save_pretrained(folder)


def _new(kind: Kind, max_position: int, window: int) -> Any:
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": _LIKE.hidden,
        "intermediate_size": _LIKE.intermediate,
        "num_hidden_layers": _LIKE.layers,
        "num_attention_heads": _LIKE.heads,
        "num_key_value_heads": _LIKE.kv_heads,
        "head_dim": _LIKE.head_dim,
        "vocab_size": _LIKE.vocab,
        "max_position_embeddings": max_position,
        "tie_word_embeddings": False,
        "pad_token_id": models.PAD,
        "bos_token_id": models.BOS,
        "eos_token_id": models.EOS,
    }
    pairs = _LIKE.layers // 2
    if kind == "mellum":
        layers = ["sliding_attention", "full_attention"] * pairs
        dense = {"mlp_layer_types": ["dense"] * _LIKE.layers}
        config: Any = transformers.MellumConfig(**sizes, **dense, layer_types=layers, sliding_window=window)
        model: Any = transformers.MellumForCausalLM(config)
    else:
        config = transformers.Qwen3NextConfig(
            **sizes,
            layer_types=["linear_attention", "full_attention"] * pairs,
            full_attention_interval=2,
            mlp_only_layers=list(range(_LIKE.layers)),
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
        )
        model = transformers.Qwen3NextForCausalLM(config)
    model.config.architectures = [type(model).__name__]
    return model.eval()
