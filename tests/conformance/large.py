"""Checkpoints with layers of an 8B Llama's sizes, made where they are served: they are too large to travel.

Two layers of random weights under this package's reference quantizers. The expected answers are still read independently.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 4096, 14336, 32, 8, 128, 2, 1024
POSITIONS = 4096
WEIGHT_STD = 0.02
INPUT_AMAX = {"down_proj": 18.0}
"""The largest inputs: the down projection has a few of this size, the others, after a norm, stay below 6."""
NORMED_AMAX = 6.0


def make(folder: Path, algo: str, device: str, shrink: int = 1) -> None:
    """Write the checkpoint of an algorithm to ``folder``; ``shrink`` divides its sizes."""
    hidden, intermediate, heads, kv_heads = (
        size // shrink for size in (HIDDEN, INTERMEDIATE, HEADS, max(KV_HEADS, shrink))
    )
    weight = WEIGHT_FORMATS[SCHEMES[algo].weights[0]]
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device)
        return (values * WEIGHT_STD * shrink**0.5).to(torch.bfloat16)

    one = torch.ones(hidden, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": normal(VOCAB, hidden), "lm_head.weight": normal(VOCAB, hidden)}
    tensors["model.norm.weight"] = one
    linears = {
        "self_attn.q_proj": (heads * HEAD_DIM, hidden),
        "self_attn.k_proj": (kv_heads * HEAD_DIM, hidden),
        "self_attn.v_proj": (kv_heads * HEAD_DIM, hidden),
        "self_attn.o_proj": (hidden, heads * HEAD_DIM),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{name}.weight": one for name in ("input_layernorm", "post_attention_layernorm")}
        for name, (rows, columns) in linears.items():
            stored = weight.quantize(normal(rows, columns))
            tensors |= {f"{prefix}{name}.{part}": tensor for part, tensor in stored.items()}
            if SCHEMES[algo].activation == "fp8_static":
                amax = INPUT_AMAX.get(name.rpartition(".")[2], NORMED_AMAX)
                tensors[f"{prefix}{name}.input_scale"] = torch.tensor(amax / 448)
            if algo in ("W4A8_AWQ", "W4A16_AWQ"):
                tensors[f"{prefix}{name}.pre_quant_scale"] = torch.ones(columns, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    # Copies, because q, k and v share no memory with each other, and norms would with one another.
    save_file({name: tensor.cpu().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    quantization = {"quant_algo": algo, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    if weight.group_size:
        quantization["group_size"] = weight.group_size
    producer = {"name": "modelopt", "version": "0.47.0"}
    _write(folder / "hf_quant_config.json", {"producer": producer, "quantization": quantization})
    _write(folder / "config.json", _config(hidden, intermediate, heads, kv_heads))


def _config(hidden: int, intermediate: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")
