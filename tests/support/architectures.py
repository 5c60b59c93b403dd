"""Tiny random models of the architectures that people quantize, by their own classes in transformers.

They show whether a model can be quantized and its export read, not what it computes: two layers, small sizes, and weights whose
rows differ in magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.support.cache import cached_folder, digest, source_digest
from tests.support.models import build_tokenizer

HIDDEN, INTERMEDIATE, EXPERTS, VOCABULARY = 256, 512, 4, 512

_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": INTERMEDIATE}
_ROUTED = {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, **_EXPERTS}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
}
_SLIDING = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}

_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "phi3": ("Phi3Config", {"head_dim": None}),
    "glm4": ("Glm4Config", {"attention_bias": True}),
    "gemma2": ("Gemma2Config", {"tie_word_embeddings": True, **_SLIDING}),
    "gemma3": ("Gemma3TextConfig", {"tie_word_embeddings": True, **_SLIDING}),
    "gemma4": (
        "Gemma4TextConfig",
        {"tie_word_embeddings": True, "global_head_dim": 64, "hidden_size_per_layer_input": 0, **_SLIDING},
    ),
    "qwen3_5": ("Qwen3_5TextConfig", _LINEAR_ATTENTION),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        {**_LINEAR_ATTENTION, **_EXPERTS, "shared_expert_intermediate_size": INTERMEDIATE},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**_LINEAR_ATTENTION, **_EXPERTS, "shared_expert_intermediate_size": INTERMEDIATE, "decoder_sparse_step": 1},
    ),
    "glm4_moe": ("Glm4MoeConfig", {**_ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_ROUTED,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "q_lora_rank": 128,
            "kv_lora_rank": 128,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 64,
        },
    ),
    "minimax_m2": ("MiniMaxM2Config", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "rotary_dim": 32}),
    "minimax": (
        "MiniMaxConfig",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            **_ROUTED,
            "num_hidden_layers": None,
            "layers_block_type": ["mamba", "attention", "mlp", "moe"],
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": INTERMEDIATE,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": INTERMEDIATE,
            "attention_chunk_size": 128,
        },
    ),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": 32}),
}
"""By name: the class of the configuration, and what it differs in; None for a size that the class has not."""


_QWEN_VISION: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
    },
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}

TEXTS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    },
    "qwen3_vl_text": {
        "head_dim": 64,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
    },
}
"""Text parts that are no model of their own, by name: what their configuration differs in."""

MULTIMODAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2_5_vl": ("Qwen2_5_VL", "qwen2_5_vl_text", _QWEN_VISION),
    "qwen3_vl": (
        "Qwen3VL",
        "qwen3_vl_text",
        {**_QWEN_VISION, "vision_config": {**_QWEN_VISION["vision_config"], "deepstack_visual_indexes": [0]}},
    ),
    "gemma3_vl": (
        "Gemma3",
        "gemma3",
        {
            "vision_config": _VISION,
            "image_token_index": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
            "mm_tokens_per_image": 1,
        },
    ),
    "qwen3_5_vl": (
        "Qwen3_5",
        "qwen3_5",
        _QWEN_VISION,
    ),
    "qwen3_5_moe_vl": (
        "Qwen3_5Moe",
        "qwen3_5_moe",
        _QWEN_VISION,
    ),
    "llama4_vl": (
        "Llama4",
        "llama4",
        {
            "vision_config": {
                **_VISION,
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
            }
        },
    ),
}
"""By name: the prefix of the classes, the text part's name above, and the rest of the configuration."""


def architecture_dir(name: str) -> Path:
    """Return the folder of the Hugging Face model of that architecture, with a tokenizer, made on the first call."""
    import transformers

    key = digest(name, transformers.__version__, source_digest(Path(__file__)))
    return cached_folder("models", f"{name}-{key}", lambda folder: _save(name, folder))


def new_model(name: str, changes: Mapping[str, Any] | None = None) -> Any:
    """Return a Hugging Face model of that architecture, as its class makes it; ``changes`` are further fields of its text part."""
    import transformers

    prefix, text, parts = MULTIMODAL.get(name, ("", name, {}))
    config_class, own = ("", TEXTS[text]) if text in TEXTS else ARCHITECTURES[text]
    sizes = {key: value for key, value in {**_SIZES, **own, **(changes or {})}.items() if value is not None}
    model: Any
    if parts:
        config = getattr(transformers, f"{prefix}Config")(text_config=sizes, **parts)
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    else:
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**sizes)).eval()
    model.config.architectures = [type(model).__name__]
    return model


def _save(name: str, folder: Path) -> None:
    model = new_model(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                spread = (0.5 * torch.randn((*parameter.shape[:-1], 1), generator=generator)).exp()
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values * spread / parameter.shape[-1] ** 0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer(VOCABULARY).save_pretrained(folder)
