"""Configuration pairs (``config.json`` and ``hf_quant_config.json``) with the structure of published checkpoints.

``PUBLISHED``: checkpoints by NVIDIA and others that SGLang serves. ``EDITED``: typical edits of such files by hand.
``EXPORTS``: ModelOpt 0.47's files for the recipes that SGLang serves wrongly or not at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_modelopt_ext.checkpoint.tensors import INDEX_NAME
from sglang_modelopt_ext.schemes.table import SCHEMES

PRODUCER = {"name": "modelopt", "version": "0.44.0"}
Json = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """One checkpoint without its weights.

    Attributes:
        name: for test ids.
        config: content of config.json.
        file: content of hf_quant_config.json, None without one.
        tensors: names of its tensors, like in an index; empty where they are unknown.
    """

    name: str
    config: Json
    file: Json | None = None
    tensors: tuple[str, ...] = ()

    def write(self, folder: Path) -> Path:
        """Write the files into ``folder`` and return it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        if self.file is not None:
            (folder / "hf_quant_config.json").write_text(json.dumps(self.file))
        if self.tensors:
            index = {"weight_map": dict.fromkeys(self.tensors, "model.safetensors")}
            (folder / INDEX_NAME).write_text(json.dumps(index))
        return folder


def model(architecture: str, model_type: str, section: Json | None = None, **fields: Any) -> Json:
    """Return a config.json of that architecture, with ``section`` as its ``quantization_config``."""
    quantization = {} if section is None else {"quantization_config": section}
    return {"architectures": [architecture], "model_type": model_type, **fields, **quantization}


def nested(algo: str | None, **fields: Any) -> Json:
    """Return a hf_quant_config.json."""
    return {"producer": PRODUCER, "quantization": {"quant_algo": algo, **fields}}


def flat(algo: str, **fields: Any) -> Json:
    """Return a ``quantization_config`` as ModelOpt converts it."""
    return {"quant_algo": algo, "producer": PRODUCER, "quant_method": "modelopt", **fields}


def group(bits: int, size: int | None = None) -> Json:
    """Return the ``config_groups`` of one format."""
    one = {"dynamic": False, "num_bits": bits, "type": "float", **({"group_size": size} if size else {})}
    return {"group_0": {"input_activations": one, "weights": one, "targets": ["Linear"]}}


def mix(**algos: str) -> Json:
    """Return ``quantized_layers``: a layer's name with ``__`` for dots, and its algorithm."""
    sizes = {
        "NVFP4": 16,
        "W4A16_NVFP4": 16,
        "MXFP8": 32,
        "FP8_BLOCK_SCALES": 128,
        "FP8_PB_WO": 128,
        "W4A8_NVFP4_FP8": 32,
    }
    return {
        name.replace("__", "."): {"quant_algo": algo, **({"group_size": sizes[algo]} if algo in sizes else {})}
        for name, algo in algos.items()
    }


FP8_KV: Json = {"dynamic": False, "num_bits": 8, "type": "float"}
GATES = [f"model.layers.{number}.mlp.gate" for number in range(3)] + ["lm_head"]
VL_IGNORE = ["lm_head", "*.mlp.shared_expert.*", "model.language_model.layers.0.linear_attn*", "model.visual*"]
MOE, DENSE = ("Qwen3MoeForCausalLM", "qwen3_moe"), ("LlamaForCausalLM", "llama")
QWEN35 = ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe")
NEMOTRON = ("NemotronHForCausalLM", "nemotron_h")

QWEN36_LAYERS = mix(
    model__language_model__layers__0__linear_attn__out_proj="FP8",
    model__language_model__layers__0__linear_attn__in_proj_qkv="FP8",
    model__language_model__layers__3__self_attn__q_proj="FP8",
    model__language_model__layers__3__self_attn__k_proj="FP8",
    model__language_model__layers__0__mlp__experts="W4A16_NVFP4",
)
"""Attention in FP8, experts in NVFP4."""

HYBRID: Json = {
    "activation_scheme": "dynamic",
    "config_groups": group(4, 16),
    "fmt": "e4m3",
    "group_size": 16,
    "ignore": ["*.attn.*", "head", "mtp.*"],
    "kv_cache_quant_algo": None,
    "moe_quant_algo": "NVFP4",
    "quant_algo": "MIXED_PRECISION",
    "quant_method": "fp8",
    "quantized_layers": mix(layers__0__ffn__experts="NVFP4"),
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
"""SGLang's HybridFp8NvFp4Config: FP8 with a ModelOpt description of the experts."""

PUBLISHED = (
    Pair("llama_fp8_file_only", model(*DENSE), nested("FP8", kv_cache_quant_algo="FP8", exclude_modules=["lm_head"])),
    Pair(
        "qwen3_fp8_without_quant_method",
        model(
            "Qwen3ForCausalLM",
            "qwen3",
            {
                "config_groups": group(8),
                "ignore": ["lm_head"],
                "quant_algo": "FP8",
                "kv_cache_scheme": "FP8",
                "producer": PRODUCER,
            },
        ),
        nested("FP8", kv_cache_quant_algo="FP8", exclude_modules=["lm_head"]),
    ),
    Pair(
        "deepseek_nvfp4_file_only",
        model("DeepseekV3ForCausalLM", "deepseek_v3", kv_lora_rank=512),
        nested(
            "NVFP4",
            kv_cache_quant_algo="FP8",
            group_size=16,
            exclude_modules=["lm_head", "model.layers.0.self_attn.kv_b_proj", "model.layers.61*"],
        ),
    ),
    Pair(
        "deepseek_hybrid_fp8_nvfp4",
        model("DeepseekV4ForCausalLM", "deepseek_v4", HYBRID),
        nested(
            "MIXED_PRECISION",
            kv_cache_quant_algo=None,
            group_size=16,
            quantized_layers=HYBRID["quantized_layers"],
            exclude_modules=HYBRID["ignore"],
        ),
    ),
    Pair(
        "glm_nvfp4",
        model(
            "GlmMoeDsaForCausalLM",
            "glm_moe_dsa",
            flat("NVFP4", config_groups=group(4, 16), ignore=["lm_head", "model.layers.0*"], kv_cache_scheme=FP8_KV),
        ),
        nested("NVFP4", kv_cache_quant_algo="FP8", group_size=16, exclude_modules=["lm_head", "model.layers.0*"]),
    ),
    Pair(
        "gemma_vision_nvfp4",
        model(
            "Gemma4ForConditionalGeneration",
            "gemma4",
            flat("NVFP4", config_groups=group(4, 16), ignore=VL_IGNORE, kv_cache_scheme=FP8_KV),
            text_config={"model_type": "gemma4_text"},
        ),
        nested("NVFP4", kv_cache_quant_algo="FP8", group_size=16, exclude_modules=VL_IGNORE),
    ),
    Pair(
        "kimi_nvfp4_config_only",
        model(
            "KimiK25ForConditionalGeneration",
            "kimi_k25",
            flat(
                "NVFP4",
                config_groups=group(4, 16),
                ignore=["language_model.lm_head", "language_model.model.layers.0.self_attn*", "vision_tower*"],
                kv_cache_scheme=FP8_KV,
            ),
        ),
    ),
    Pair(
        "minimax_nvfp4",
        model(
            "MiniMaxM2ForCausalLM",
            "minimax_m2",
            flat("NVFP4", config_groups=group(4, 16), ignore=["model.layers.0.self_attn*"], kv_cache_scheme=FP8_KV),
        ),
        nested("NVFP4", kv_cache_quant_algo="FP8", group_size=16, exclude_modules=["model.layers.0.self_attn*"]),
    ),
    Pair(
        "nemotron_nvfp4_file_only",
        model(*NEMOTRON),
        nested(
            "NVFP4",
            kv_cache_quant_algo="FP8",
            group_size=16,
            exclude_modules=["lm_head", "backbone.layers.4.mixer.in_proj", "backbone.layers.5.mixer.q_proj"],
        ),
    ),
    Pair(
        "nemotron_nvfp4_bare",
        model(*NEMOTRON),
        {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}},
    ),
    Pair(
        "nemotron_mix_file_only",
        model(*NEMOTRON),
        nested(
            "MIXED_PRECISION",
            kv_cache_quant_algo="FP8",
            quantized_layers=mix(
                backbone__layers__0__mixer__in_proj="FP8",
                backbone__layers__1__mixer__experts__0__down_proj="W4A16_NVFP4",
                backbone__layers__1__mixer__experts__0__up_proj="W4A16_NVFP4",
            ),
            exclude_modules=["backbone.embeddings", "backbone.layers.1.mixer.gate", "mtp*"],
        ),
    ),
    Pair(
        "qwen3_moe_nvfp4_file_only",
        model(*MOE),
        nested("NVFP4", kv_cache_quant_algo="FP8", group_size=16, exclude_modules=GATES),
    ),
    Pair(
        "qwen35_nvfp4",
        model(*QWEN35, flat("NVFP4", config_groups=group(4, 16), ignore=VL_IGNORE, kv_cache_scheme=FP8_KV)),
        nested("NVFP4", kv_cache_quant_algo="FP8", group_size=16, exclude_modules=VL_IGNORE),
    ),
    Pair(
        "qwen36_mix_with_its_kv_cache_in_one_file",
        model(
            *QWEN35,
            flat(
                "MIXED_PRECISION",
                config_groups={**group(8), "group_1": group(4, 16)["group_0"]},
                quantized_layers=QWEN36_LAYERS,
                ignore=["mtp.layers.0*", "mtp*"],
            ),
        ),
        nested(
            "MIXED_PRECISION",
            kv_cache_quant_algo="FP8",
            quantized_layers=QWEN36_LAYERS,
            exclude_modules=["mtp.layers.0*", "mtp*"],
        ),
    ),
    Pair(
        "mix_with_block_fp8",
        model(
            *QWEN35,
            flat(
                "MIXED_PRECISION",
                ignore=["lm_head"],
                kv_cache_quant_algo=None,
                quantized_layers=mix(
                    model__layers__0__mlp__experts="NVFP4", mtp__layers__0__mlp__experts="FP8_BLOCK_SCALES"
                ),
            ),
        ),
    ),
    Pair(
        "mix_with_mxfp8",
        model(
            "MiniMaxM3SparseForCausalLM",
            "minimax_m3",
            flat(
                "MIXED_PRECISION",
                exclude_modules=["lm_head"],
                kv_cache_quant_algo=None,
                quantized_layers=mix(
                    model__layers__0__self_attn__q_proj="MXFP8",
                    model__layers__1__block_sparse_moe__experts__0__w1="NVFP4",
                ),
            ),
        ),
        tensors=(
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.q_proj.weight_scale_inv",
            "model.layers.1.block_sparse_moe.experts.0.w1.weight_scale",
        ),
    ),
    Pair(
        "mix_with_modelopts_block_fp8_on_kimi",
        model("KimiK3ForConditionalGeneration", "kimi_k3"),
        nested(
            "MIXED_PRECISION",
            kv_cache_quant_algo=None,
            quantized_layers=mix(
                language_model__model__layers__0__self_attn__o_proj="FP8_PB_WO",
                language_model__model__layers__1__mlp__experts="NVFP4",
            ),
        ),
        tensors=("language_model.model.layers.0.self_attn.o_proj.weight_scale",),
    ),
    Pair("w4afp8_bare_mix", model("DeepseekV3ForCausalLM", "deepseek_v3"), nested("MIXED_PRECISION")),
    Pair("eagle_head_not_quantized", model("LlamaForCausalLMEagle3", "llama"), nested(None, kv_cache_quant_algo=None)),
    Pair("not_quantized", model(*DENSE)),
    Pair("awq", model(*DENSE, {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True})),
    Pair(
        "block_fp8",
        model(*MOE, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}),
    ),
)

_NVFP4 = nested("NVFP4", kv_cache_quant_algo=None, group_size=16, exclude_modules=["lm_head"])

EDITED = (
    Pair("kv_in_config_only", model(*DENSE, flat("FP8", ignore=[], kv_cache_scheme=FP8_KV)), nested("FP8")),
    Pair(
        "lists_that_differ",
        model(*DENSE, flat("NVFP4", config_groups=group(4, 16), ignore=["lm_head", "model.layers.0*"])),
        _NVFP4,
    ),
    Pair("fp8_beside_a_left_over_file", model(*DENSE, {"quant_method": "fp8", "activation_scheme": "dynamic"}), _NVFP4),
    Pair(
        "compressed_tensors_beside_a_left_over_file",
        model(
            *DENSE,
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True},
                        "input_activations": None,
                    }
                },
                "ignore": ["lm_head"],
            },
        ),
        _NVFP4,
    ),
    Pair("empty_section_beside_bf16", model(*DENSE), {"producer": PRODUCER, "quantization": {}}),
    Pair(
        "empty_section_beside_a_whole_one",
        model(*DENSE, flat("NVFP4", config_groups=group(4, 16), ignore=["lm_head"])),
        {"producer": PRODUCER, "quantization": {}},
    ),
    Pair("files_that_disagree", model(*DENSE, flat("FP8", ignore=["lm_head"])), _NVFP4),
    Pair("malformed_group_size", model(*DENSE, flat("NVFP4", ignore=[])), nested("NVFP4", group_size="16")),
    Pair("malformed_layers", model(*DENSE, flat("FP8", ignore=[])), nested("MIXED_PRECISION", quantized_layers=["a"])),
    Pair("unknown_algorithm", model(*DENSE), nested("W2A2")),
    Pair("unknown_algorithm_in_config", model(*DENSE, flat("W2A2"))),
    Pair(
        "unknown_algorithm_in_a_mix",
        model(*QWEN35),
        nested("MIXED_PRECISION", quantized_layers=mix(model__layers__0__mlp__experts="NVFP4", mtp__a="W2A2")),
    ),
    Pair(
        "layers_that_differ",
        model(*QWEN35, flat("MIXED_PRECISION", quantized_layers=mix(a="NVFP4"), kv_cache_scheme=None)),
        nested("MIXED_PRECISION", quantized_layers=mix(a="FP8")),
    ),
    Pair("list_for_a_section", model(*DENSE), {"producer": PRODUCER, "quantization": []}),
)


def _spelled(algo: str) -> str:
    """Return ``quant_algo`` in ModelOpt's spelling, which has two in lower case."""
    return algo.lower() if algo in ("MXFP4", "FP8_PB_WO") else algo


EXPERTS = "model.layers.0.mlp.experts"
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
_SHARDS = mix(
    model__layers__0__mlp__gate_proj="FP8",
    model__layers__0__mlp__up_proj="FP8",
    model__layers__0__mlp__down_proj="NVFP4",
)

EXPORTS = (
    *(
        Pair(f"only_{scheme.algo}", model(*DENSE), nested(_spelled(scheme.algo), exclude_modules=["lm_head"]))
        for scheme in SCHEMES.values()
        if scheme.stock_flag is None
    ),
    Pair(
        "w4a8_in_both_files",
        model(*DENSE, flat("W4A8_NVFP4_FP8", ignore=["lm_head"])),
        nested("W4A8_NVFP4_FP8", group_size=32, kv_cache_quant_algo=None, exclude_modules=["lm_head"]),
    ),
    Pair("awq_nvfp4", model(*DENSE), nested("NVFP4_AWQ", group_size=16, exclude_modules=["lm_head"])),
    Pair("nvfp4_in_groups_of_32", model(*DENSE), nested("W4A16_NVFP4", group_size=32, exclude_modules=["lm_head"])),
    Pair(
        "smoothed_fp8",
        model(*DENSE),
        nested("FP8", exclude_modules=["lm_head"]),
        tensors=(f"{UP}.weight", f"{UP}.weight_scale", f"{UP}.input_scale", f"{UP}.pre_quant_scale"),
    ),
    Pair(
        "mix_of_shards_on_a_model_without_mapping",
        model("Qwen2ForCausalLM", "qwen2"),
        nested("MIXED_PRECISION", quantized_layers=_SHARDS),
    ),
    Pair(
        "mix_of_whole_layers_on_a_model_without_mapping",
        model("Qwen2ForCausalLM", "qwen2"),
        nested("MIXED_PRECISION", quantized_layers={DOWN: _SHARDS[DOWN]}),
    ),
    Pair(
        "mix_with_a_quantized_vocabulary",
        model(*MOE),
        nested(
            "MIXED_PRECISION",
            quantized_layers=mix(
                lm_head="NVFP4", model__embed_tokens="W4A16_NVFP4", model__layers__0__mlp__experts="NVFP4"
            ),
        ),
    ),
    Pair(
        "mix_with_a_weight_only_fp8_head",
        model(*MOE),
        nested("MIXED_PRECISION", quantized_layers=mix(lm_head="FP8", model__layers__0__mlp__experts="NVFP4")),
        tensors=("lm_head.weight", "lm_head.weight_scale"),
    ),
    Pair(
        "quantized_embedding_not_listed",
        model(*MOE),
        nested("NVFP4", group_size=16, exclude_modules=["lm_head"]),
        tensors=("model.embed_tokens.weight", "model.embed_tokens.weight_scale"),
    ),
    Pair(
        "mix_of_fp8", model(*MOE), nested("MIXED_PRECISION", quantized_layers=mix(model__layers__0__mlp__experts="FP8"))
    ),
    Pair(
        "mix_with_fp8_experts",
        model(*MOE),
        nested(
            "MIXED_PRECISION",
            quantized_layers=mix(model__layers__0__mlp__experts="FP8", model__layers__1__mlp__experts="NVFP4"),
        ),
    ),
    Pair(
        "mix_inside_an_expert",
        model(*MOE),
        nested(
            "MIXED_PRECISION",
            quantized_layers=mix(
                model__layers__0__mlp__experts__0__down_proj="FP8", model__layers__0__mlp__experts__0__up_proj="NVFP4"
            ),
        ),
    ),
    Pair(
        "an_unquantized_expert",
        model(*MOE),
        nested("NVFP4", group_size=16, exclude_modules=["lm_head"]),
        tensors=(f"{EXPERTS}.0.up_proj.weight", f"{EXPERTS}.0.up_proj.weight_scale", f"{EXPERTS}.1.up_proj.weight"),
    ),
    Pair(
        "experts_of_another_layer_unquantized",
        model(*MOE),
        nested("NVFP4", group_size=16, exclude_modules=["lm_head", "model.layers.1*"]),
        tensors=(
            *(f"{EXPERTS}.0.up_proj.weight", f"{EXPERTS}.0.up_proj.weight_scale"),
            "model.layers.1.mlp.experts.0.up_proj.weight",
        ),
    ),
    Pair(
        "mix_with_w4a8",
        model(*MOE),
        nested(
            "MIXED_PRECISION",
            quantized_layers=mix(
                model__layers__0__mlp__experts="NVFP4", model__layers__0__self_attn__o_proj="W4A8_NVFP4_FP8"
            ),
        ),
    ),
    Pair(
        "mix_with_modelopts_mxfp8",
        model(*MOE),
        nested(
            "MIXED_PRECISION",
            quantized_layers=mix(model__layers__0__mlp__experts="NVFP4", model__layers__0__self_attn__o_proj="MXFP8"),
        ),
        tensors=("model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.weight_scale"),
    ),
    Pair(
        "mixtral_experts_only",
        model("MixtralForCausalLM", "mixtral"),
        nested("NVFP4", group_size=16, exclude_modules=["lm_head", "model.layers.0.self_attn*"]),
    ),
    Pair("gpt_oss", model("GptOssForCausalLM", "gpt_oss"), nested("FP8", exclude_modules=["lm_head"])),
    Pair("kv_cache_only", model(*DENSE), nested(None, kv_cache_quant_algo="FP8")),
    Pair(
        "kv_cache_only_in_both_files",
        model(*DENSE, {"kv_cache_scheme": FP8_KV, "quant_method": "modelopt", "producer": PRODUCER}),
        nested(None, kv_cache_quant_algo="FP8"),
    ),
)
