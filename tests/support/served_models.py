"""Tiny random models of the architectures that SGLang 0.5.23 runs on a GPU only, in sizes that its kernels there take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support import architectures
from tests.support.cache import cached_folder, digest, source_digest
from tests.support.models import BLOCK, LOGIT_STD, build_tokenizer

HIDDEN, VOCABULARY, INTERMEDIATE, POSITIONS = architectures.HIDDEN, architectures.VOCABULARY, 128, 4096
BIAS_STD, NORM_STD = 0.3, 0.1
LEVELS = {"embed_tokens": 1.0, "embeddings": 1.0, "lm_head": LOGIT_STD / HIDDEN**0.5}
"""Standard deviations of an embedding, which weighs as much as what layers add to it, and of a head."""
COARSE = ~0b1111
"""Bits of a bf16 weight that are not cleared: models and their exports travel compressed."""
TIED = {"embed_tokens": HIDDEN**-0.5}
"""That of both in one, which Gemma multiplies by the root of its width before its first layer."""
TIED_NORM = -0.5
"""The mean of Gemma's last norm, whose gain is one more: a token's likeliest successor is itself, but not with certainty."""

_LINEAR_ATTENTION: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "full_attention_interval": 2,
}
_EXPERTS = {"moe_intermediate_size": INTERMEDIATE}


def _heads(head_dim: int) -> dict[str, int]:
    """Return two heads of the width that published models of the family have, and one of keys and values."""
    return {"head_dim": head_dim, "num_attention_heads": 2, "num_key_value_heads": 1}


_SLIDING = {"sliding_window": 128}

SERVED: dict[str, dict[str, Any]] = {
    "gpt_oss": {**_SLIDING, "intermediate_size": INTERMEDIATE},
    "qwen3_next": {
        **_LINEAR_ATTENTION,
        **_EXPERTS,
        **_heads(256),
        "shared_expert_intermediate_size": INTERMEDIATE,
    },
    "qwen3_5": {**_LINEAR_ATTENTION, **_heads(256)},
    # The sizes that SGLang's kernels of latent attention, and of blocks of multi-token prediction, are written for, and the
    # rotation that its class takes.
    "deepseek_v3": {
        **_EXPERTS,
        "hidden_size": 2 * HIDDEN,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "head_dim": 64,
        "max_position_embeddings": 4 * POSITIONS,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": POSITIONS,
        },
    },
    "nemotron_h": {
        **_EXPERTS,
        "moe_shared_expert_intermediate_size": INTERMEDIATE,
        **_heads(128),
        "n_groups": 8,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
    },
    # The multimodal class: SGLang's other one does not take the rotation of transformers' weights.
    "llama4_vl": {
        **_heads(128),
        "intermediate_size": INTERMEDIATE,
        "intermediate_size_mlp": INTERMEDIATE,
        "attention_chunk_size": 8192,
    },
    "gemma3": {**_SLIDING, **_heads(256)},
    "minimax_m2": {},
    "glm4_moe": {**_EXPERTS, "use_qk_norm": True, "routed_scaling_factor": 2.5},
    "qwen2_5_vl": {},
    "qwen3_vl": {},
}
"""By the names of :data:`tests.support.architectures.ARCHITECTURES`: fields that differ from those there."""


def served_dir(name: str) -> Path:
    """Return the folder of the Hugging Face model of that architecture, with a tokenizer, made on the first call."""
    import transformers

    key = digest(name, transformers.__version__, source_digest(Path(__file__), Path(architectures.__file__)))
    return cached_folder("models", f"served-{name}-{key}", lambda folder: _save(name, folder))


def _save(name: str, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)  # what is drawn by the class itself, such as the decay of a linear attention
        model = architectures.new_model(name, {"max_position_embeddings": POSITIONS, **SERVED[name]})
        model.config.vocab_size = VOCABULARY  # multimodal configurations have it in their text part only
        for parameter_name, parameter in model.named_parameters():
            _draw(parameter_name, parameter, model.config.tie_word_embeddings)
        model.to(torch.bfloat16)
        for parameter in model.parameters():
            parameter.view(torch.int16).bitwise_and_(COARSE)
    model.save_pretrained(folder)
    build_tokenizer(VOCABULARY).save_pretrained(folder)


def _draw(name: str, parameter: torch.Tensor, tied: bool) -> None:
    """Fill a parameter: rows, experts and blocks of different magnitude, so that a scale of another is noticed."""
    values = torch.randn(parameter.shape)
    if name.endswith(("bias", "sinks")) and "dt_bias" not in name:
        parameter.copy_(BIAS_STD * values)
    elif (kind := name.removesuffix(".weight").rpartition(".")[2]) in (levels := TIED if tied else LEVELS):
        parameter.copy_(levels[kind] * values)
    elif parameter.dim() > 1:
        spread = (0.5 * torch.randn((*parameter.shape[:-1], 1))).exp() * _uneven(parameter.shape)
        parameter.copy_(values * spread / parameter.shape[-1] ** 0.5)
    elif "norm" in name:
        parameter.add_(NORM_STD * values + TIED_NORM * (tied and name == "model.norm.weight"))


def _uneven(shape: torch.Size) -> torch.Tensor:
    """Return factors of blocks along the last dimension, and of packed experts along the one before, that keep the variance."""
    factors = torch.ones(shape)
    for dim in range(1, len(shape)):
        blocks = [*shape]
        blocks[dim] = -(-shape[dim] // BLOCK)
        block = (0.5 * torch.randn(blocks) - 0.25).exp()
        factors *= block.repeat_interleave(BLOCK, dim=dim).narrow(dim, 0, shape[dim])
    return factors
