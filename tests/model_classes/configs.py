"""A small configuration for each of SGLang's model classes: the defaults of its configuration class, but few layers and experts."""

from __future__ import annotations

import inspect
import json
import typing
from pathlib import Path
from typing import Any

import torch
from torch import nn

LAYERS = 4
"""Most decoder layers: hybrid classes have each of their kinds within so many."""

PATTERN = 6
"""Layers of a configuration that is left as it is: Gemma's pattern repeats after so many."""

EXPERTS = 16
"""Most routed experts of a layer."""

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers")
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")

_YARN = {
    "rope_type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
_DEEPSEEK = {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_scaling": _YARN}
_GEMMA4 = {"num_hidden_layers": PATTERN}
_HYBRID = {"full_attention_interval": 4}
_QWEN35 = {"text_config": _HYBRID, "vision_config": {"deepstack_visual_indexes": []}}
_BERT = {"position_embedding_type": "absolute"}

FIELDS: dict[str, dict[str, Any]] = {
    "BertForSequenceClassification": _BERT,
    "BertModel": _BERT,
    "DeepseekV2ForCausalLM": _DEEPSEEK
    | {"moe_intermediate_size": 1408, "topk_method": "greedy", "scoring_func": "softmax"}
    | {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "DeepseekV3ForCausalLM": _DEEPSEEK,
    "ExaoneMoeForCausalLM": {"is_moe_layer": [False, True, True, True]},
    "Gemma2ForCausalLM": {"hidden_act": "gelu_pytorch_tanh"},
    "Gemma2ForSequenceClassification": {"hidden_act": "gelu_pytorch_tanh"},
    "Gemma3ForConditionalGeneration": {"vision_config": {"vision_use_head": False}},
    "Gemma4ForCausalLM": _GEMMA4,
    "Gemma4ForConditionalGeneration": {"text_config": _GEMMA4},
    "Gemma4UnifiedForConditionalGeneration": {"text_config": _GEMMA4},
    "Glm4MoeLiteForCausalLM": {"first_k_dense_replace": 1, "moe_layer_freq": 1},
    "HYV3ForCausalLM": {"route_norm": True, "first_k_dense_replace": 1, "qk_norm": True},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 128},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 128},
    "Lfm2VlForConditionalGeneration": {"vision_config": {"vision_use_head": False}},
    "MiMoV2FlashForCausalLM": {"hybrid_layer_pattern": [0, 1, 1, 0]},
    "MiniMaxM2ForCausalLM": {"scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True},
    "Mistral3ForConditionalGeneration": {"tie_word_embeddings": False},
    "NemotronHForCausalLM": {"moe_intermediate_size": 7680, "moe_shared_expert_intermediate_size": 7680},
    "Qwen3NextForCausalLM": _HYBRID,
    "Qwen3_5ForCausalLM": _HYBRID,
    "Qwen3_5ForConditionalGeneration": _QWEN35,
    "Qwen3_5MoeForCausalLM": _HYBRID,
    "Qwen3_5MoeForConditionalGeneration": _QWEN35,
    "Qwen2VLForConditionalGeneration": {"vision_config": {"in_chans": 3}},
    "XLMRobertaForSequenceClassification": _BERT,
    "XLMRobertaModel": _BERT,
}
"""Fields of published configurations that SGLang's class reads and the defaults lack, or whose default no block divides."""


STORED_FIELDS: dict[str, dict[str, Any]] = {
    "Exaone4ForCausalLM": {"sliding_window_pattern": "LLLG"},
    "NemotronHForCausalLM": {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
}
"""Fields whose published values SGLang's configuration class knows, and transformers' does not."""


def config_class(architecture: str) -> type[Any] | None:
    """Return the configuration class of an architecture: of transformers' class, else the one SGLang's class is written for."""
    import transformers
    from sglang.srt.models.registry import ModelRegistry

    cls = getattr(transformers, architecture, None)
    if cls is not None:
        return typing.cast("type[Any]", cls.config_class)
    entry = ModelRegistry.models[architecture]
    try:
        found = typing.get_type_hints(entry.__init__).get("config")
    except (NameError, TypeError):
        found = None
    if not inspect.isclass(found) or not issubclass(found, transformers.PretrainedConfig):
        return None
    return None if found is transformers.PretrainedConfig else found


def small_config(architecture: str, cls: type[Any]) -> Any:
    """Return a configuration of ``cls`` for the architecture."""
    config = cls(**FIELDS.get(architecture, {}))
    _shorten(config)
    config.architectures = [architecture]
    return config


def save(config: Any, folder: Path) -> None:
    """Write config.json, with the fields of :data:`FIELDS` that the class computes others of and drops."""
    config.save_pretrained(folder)
    file = folder / "config.json"
    content = json.loads(file.read_text())
    _merge(content, FIELDS.get(config.architectures[0], {}))
    content |= STORED_FIELDS.get(config.architectures[0], {})
    file.write_text(json.dumps(content))


def _merge(content: dict[str, Any], fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if isinstance(value, dict) and isinstance(content.get(name), dict):
            _merge(content[name], value)
        else:
            content.setdefault(name, value)


def meta_model(architecture: str, config: Any) -> nn.Module | None:
    """Return transformers' model of the architecture on the meta device, None where it has no such class."""
    import transformers

    cls = getattr(transformers, architecture, None)
    if cls is None:
        return None
    with torch.device("meta"):
        model: nn.Module = cls(config).to(torch.bfloat16)
    return model.eval()


def _shorten(config: Any) -> None:
    """Reduce layers and experts of a configuration and of those inside it, and its lists with an entry for each layer."""
    values = vars(config)
    for value in list(values.values()):
        if hasattr(value, "to_dict"):
            _shorten(value)
    for name in _EXPERTS:
        if isinstance(values.get(name), int):
            setattr(config, name, min(EXPERTS, values[name]))
    for name in _LAYERS:
        count = values.get(name)
        if not isinstance(count, int) or count <= PATTERN:
            continue
        for field, value in list(values.items()):
            if isinstance(value, list) and len(value) == count:
                setattr(config, field, value[:LAYERS])
        setattr(config, name, LAYERS)
