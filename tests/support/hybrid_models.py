"""Tiny models whose layers differ, and their exports with a quantized KV cache: a window in every other layer.

SGLang keeps the caches of the layers apart: it calls the pools of all of them hybrid. On a CPU it serves a Mellum, and, with its
Triton attention in Triton's interpreter, a Granite with windows and attention sinks.
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

Kind = Literal["mellum", "granite_swa"]
WINDOW = 24
"""Keys that a token sees in the first layer and every other of a model with windows."""

_LIKE = TinyModel("qwen3", layers=4)
"""The model whose weights are taken where names agree."""


def hybrid_dir(kind: Kind, max_position: int = 2048, window: int = WINDOW) -> Path:
    """Return the folder of the Hugging Face model, made on the first call."""
    import transformers

    sources = source_digest(Path(__file__), Path(models.__file__))
    key = digest(kind, max_position, window, transformers.__version__, sources)
    return cached_folder("models", f"{kind}-{key}", lambda folder: _save(kind, max_position, window, folder))


def hybrid_export(kind: Kind, recipe: str, max_position: int = 2048, window: int = WINDOW) -> Path:
    """Return the export of the model with that KV recipe and unquantized layers."""
    return export(hybrid_dir(kind, max_position, window), UNQUANTIZED, Variant(kv_cache=PRESETS[recipe]))


def _save(kind: Kind, max_position: int, window: int, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = _new(kind, max_position, window)
        for name, parameter in model.named_parameters():
            _draw(name, parameter)
    model.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer(_LIKE.vocab).save_pretrained(folder)


def _draw(name: str, parameter: torch.Tensor) -> None:
    """Fill a parameter."""
    if name.endswith("sinks"):
        parameter.normal_(mean=1.0)
    else:
        parameter.copy_(models._Weights(_LIKE).make(name, tuple(parameter.shape)))


def _new(kind: Kind, max_position: int, window: int) -> Any:
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": _LIKE.hidden,
        "intermediate_size": _LIKE.intermediate,
        "num_hidden_layers": _LIKE.layers,
        "num_attention_heads": _LIKE.heads,
        "num_key_value_heads": _LIKE.kv_heads,
        "vocab_size": _LIKE.vocab,
        "max_position_embeddings": max_position,
        "tie_word_embeddings": False,
        "pad_token_id": models.PAD,
        "bos_token_id": models.BOS,
        "eos_token_id": models.EOS,
    }
    sizes["layer_types"] = ["sliding_attention", "full_attention"] * (_LIKE.layers // 2)
    own: dict[Kind, dict[str, Any]] = {
        "mellum": {
            "head_dim": _LIKE.head_dim,
            "mlp_layer_types": ["dense"] * _LIKE.layers,
            "sliding_window": window,
        },
        "granite_swa": {"sliding_window": window, "attention_multiplier": _LIKE.head_dim**-0.5},
    }
    name = {"mellum": "Mellum", "granite_swa": "GraniteSWA"}[kind]
    config = getattr(transformers, f"{name}Config")(**sizes, **own[kind])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.config.architectures = [type(model).__name__]
    return model.eval()
