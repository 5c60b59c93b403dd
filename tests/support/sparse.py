"""A checkpoint with the headers of a large model and none of its bytes: sparse files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

Shape = tuple[int, ...]
Header = tuple[str, Shape]
"""Dtype, in safetensors' spelling, and shape."""

SIZES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1, "I8": 1, "I64": 8}


def write_sparse(file: Path, tensors: Mapping[str, Header], scalar: float) -> None:
    """Write a safetensors file whose one-value float32 tensors are ``scalar``; the rest is a hole, read as zeros."""
    header, offset, scalars = {}, 0, []
    for name, (dtype, shape) in tensors.items():
        size = SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        if not shape and dtype == "F32":
            scalars.append(offset)
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(start + offset)
        for position in scalars:
            stream.seek(start + position)
            stream.write(struct.pack("<f", scalar))


def llama_70b(folder: Path) -> Path:
    """Return the headers of Llama 3 70B as ModelOpt exports it with NVFP4_DEFAULT and FP8_KV: 80 layers in 9 files."""
    hidden, intermediate, vocabulary, layers, heads, kv_heads, head_dim = 8192, 28672, 128256, 80, 64, 8, 128
    linears = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    files: list[dict[str, Header]] = [{} for _ in range(9)]
    files[0]["model.embed_tokens.weight"] = ("BF16", (vocabulary, hidden))
    for layer in range(layers):
        tensors = files[layer * len(files) // layers]
        prefix = f"model.layers.{layer}."
        for name, (n, k) in linears.items():
            tensors[f"{prefix}{name}.weight"] = ("U8", (n, k // 2))
            tensors[f"{prefix}{name}.weight_scale"] = ("F8_E4M3", (n, k // 16))
            tensors[f"{prefix}{name}.weight_scale_2"] = ("F32", ())
            tensors[f"{prefix}{name}.input_scale"] = ("F32", ())
        tensors[f"{prefix}self_attn.k_proj.k_scale"] = ("F32", ())
        tensors[f"{prefix}self_attn.v_proj.v_scale"] = ("F32", ())
        tensors[f"{prefix}input_layernorm.weight"] = ("BF16", (hidden,))
        tensors[f"{prefix}post_attention_layernorm.weight"] = ("BF16", (hidden,))
    files[-1]["model.norm.weight"] = ("BF16", (hidden,))
    files[-1]["lm_head.weight"] = ("BF16", (vocabulary, hidden))
    weight_map = {}
    folder.mkdir(parents=True, exist_ok=True)
    for number, tensors in enumerate(files, 1):
        file = folder / f"model-{number:05}-of-{len(files):05}.safetensors"
        write_sparse(file, tensors, 0.01)
        weight_map |= dict.fromkeys(tensors, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    quantization = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    }
    content = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps(content))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
