"""Tiny random drafts of speculative decoding, for a tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def random(*shape: int, seed: int) -> torch.Tensor:
    """Return random values in bf16."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def eagle3(folder: Path, **fields: Any) -> Path:
    """Make an EAGLE3 draft of a tiny Llama: one layer whose attention takes twice the hidden size, and a small head."""
    hidden, heads, kv_heads, head_dim, rows, small = 256, 4, 2, 64, 512, 128
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": rows,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": 512,
        "draft_vocab_size": small,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **fields,
    }
    shapes = {
        "midlayer.self_attn.q_proj": (heads * head_dim, 2 * hidden),
        "midlayer.self_attn.k_proj": (kv_heads * head_dim, 2 * hidden),
        "midlayer.self_attn.v_proj": (kv_heads * head_dim, 2 * hidden),
        "midlayer.self_attn.o_proj": (hidden, heads * head_dim),
        "midlayer.mlp.gate_proj": (rows, hidden),
        "midlayer.mlp.up_proj": (rows, hidden),
        "midlayer.mlp.down_proj": (hidden, rows),
        "midlayer.input_layernorm": (hidden,),
        "midlayer.hidden_norm": (hidden,),
        "midlayer.post_attention_layernorm": (hidden,),
        "fc": (hidden, 3 * hidden),
        "norm": (hidden,),
        "lm_head": (small, hidden),
    }
    tensors = {f"{name}.weight": random(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    tensors |= {"d2t": torch.arange(small), "t2d": torch.arange(512) < small}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder
