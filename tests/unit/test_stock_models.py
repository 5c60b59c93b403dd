"""The facts about SGLang's model classes agree with their sources, and exclusions cover all of SGLang's."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang_modelopt_ext.checkpoint.names import EXPERT, FUSED_SHARDS, Exclusions
from sglang_modelopt_ext.checkpoint.stock import MIX_ALGOS, NVFP4_ALGOS
from sglang_modelopt_ext.checkpoint.stock_models import (
    MODELS_THAT_RENAME_BLOCK_SCALES,
    MODELS_WITH_PACKED_EXPERTS,
    unmapped_in,
)
from sglang_modelopt_ext.schemes.versions import described_sglang
from tests.support.sglang_models import models_that_rename_block_scales, unmapped_layers


def test_the_table_is_that_of_the_installed_sglang() -> None:
    assert unmapped_layers() == unmapped_in(described_sglang())
    assert models_that_rename_block_scales() == MODELS_THAT_RENAME_BLOCK_SCALES


def stock_mix(architecture: str, layers: dict[str, str]) -> object:
    """Return SGLang's configuration of a mix, as its loader makes it for a model class."""
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptMixedPrecisionConfig
    from sglang.srt.models.registry import ModelRegistry

    model, _ = ModelRegistry.resolve_model_cls([architecture])
    content = {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {name: {"quant_algo": algo} for name, algo in layers.items()},
        "packed_modules_mapping": getattr(model, "packed_modules_mapping", {}),
    }
    return ModelOptMixedPrecisionConfig.from_config(content)


@pytest.mark.parametrize(
    "architecture", ["Qwen2ForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"]
)
def test_sglang_does_not_find_the_shards_of_a_model_without_mapping(architecture: str) -> None:
    """Such a mix is ours: NVFP4 fails on its shape in SGLang, FP8 codes are copied without their scales."""
    shards = [
        f"model.layers.0.{block}.{name}"
        for block, fused in (("self_attn", "qkv_proj"), ("mlp", "gate_up_proj"))
        for name in FUSED_SHARDS[fused]
    ]
    config = stock_mix(architecture, {**dict.fromkeys(shards, "FP8"), "model.layers.0.mlp.down_proj": "NVFP4"})
    assert config._resolve_quant_algo("model.layers.0.mlp.down_proj") == "NVFP4"  # type: ignore[attr-defined]
    for block, fused in (("self_attn", "qkv_proj"), ("mlp", "gate_up_proj")):
        found = config._resolve_quant_algo(f"model.layers.0.{block}.{fused}")  # type: ignore[attr-defined]
        assert found == (None if fused in unmapped_in(described_sglang()).get(architecture, ()) else "FP8")


@pytest.mark.parametrize("algo", sorted(MIX_ALGOS | {"W4A8_NVFP4_FP8", "W4A16_AWQ"}))
def test_the_algorithms_of_a_mix_are_those_sglang_has_a_method_for(algo: str) -> None:
    """Others it takes for unquantized. The methods need a GPU, so the names in the code are looked at."""
    import inspect

    from sglang.srt.layers.quantization import modelopt_quant

    code = inspect.getsource(modelopt_quant.ModelOptMixedPrecisionConfig.get_quant_method)
    known = f'"{algo}"' in code or algo in modelopt_quant._BLOCK_FP8_ALGOS
    assert known == (algo in MIX_ALGOS)
    detection = inspect.getsource(
        __import__("sglang.srt.configs.model_config", fromlist=["x"]).ModelConfig._parse_modelopt_quant_config
    )
    assert (f'"{algo}"' in detection.split("MIXED_PRECISION", 2)[1].split("modelopt_mixed")[0]) == (algo in NVFP4_ALGOS)


@pytest.mark.parametrize("name", ["modelopt_fp8", "modelopt_fp4", "modelopt_mixed"])
def test_sglang_does_not_load_packed_experts(name: str) -> None:
    """Every tensor of gpt-oss's experts but their biases goes through this, whether it is quantized or not."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.models.gpt_oss import GptOssForCausalLM

    assert {GptOssForCausalLM.__name__} == MODELS_WITH_PACKED_EXPERTS
    layer: Any = SimpleNamespace(quant_config=SimpleNamespace(get_name=lambda: name))
    packed = torch.zeros(4, 256, 128)
    with pytest.raises(ValueError, match="Expected 2D tensors"):
        FusedMoE._load_w2(layer, packed, 2, "w2", packed)


PATTERNS = (
    "lm_head",
    "model.layers.1.",
    "model.layers.1",
    "model.layers.1*",
    "model.layers.1.*",
    "self_attn",
    "self_attn*",
    "*self_attn*",
    "*self_attn.qkv_proj",
    "mlp.gate",
    "*mlp.gate",
    "model.layers.0.mlp.gate",
    "*language_model*self_attn*",
    "*.mlp.shared_expert.*",
    "model.language_model.layers.0.linear_attn*",
    "language_model.model.layers.0.self_attn*",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.experts",
    "model.layers.0.mlp.experts*",
    "mtp*",
    "gate_up_proj",
    "*gate_proj",
)
BLOCKS = (
    "self_attn.qkv_proj",
    "self_attn.o_proj",
    "mlp.gate_up_proj",
    "mlp.down_proj",
    "mlp.gate",
    "mlp.experts",
    "mlp.shared_expert.gate_up_proj",
)
PREFIXES = (
    "lm_head",
    "language_model.lm_head",
    "mtp.layers.0.mlp.down_proj",
    *(
        f"{root}layers.{number}.{block}"
        for root in ("model.", "language_model.model.", "model.language_model.")
        for number in (0, 1, 11)
        for block in BLOCKS
    ),
)


def test_exclusions_cover_all_that_sglangs_do() -> None:
    """Every layer that SGLang leaves unquantized for a pattern is one by ours, shard by shard."""
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp8Config
    from sglang.srt.layers.quantization.utils import is_layer_skipped

    mapping = {fused: list(shards) for fused, shards in FUSED_SHARDS.items()}
    covered = 0
    for pattern, prefix in itertools.product(PATTERNS, PREFIXES):
        stock = ModelOptFp8Config(exclude_modules=[pattern], packed_modules_mapping=mapping)
        try:
            skipped = "experts" not in prefix and is_layer_skipped(prefix, [pattern], mapping)
        except ValueError:  # some shards of a fused layer and not others
            continue
        if not skipped and not stock.is_layer_excluded(prefix):
            continue
        parent, _, last = prefix.rpartition(".")
        for shard in FUSED_SHARDS.get(last, (last,)):
            covered += 1
            assert Exclusions([pattern]).cover(f"{parent}.{shard}" if parent else shard), (pattern, prefix)
    assert covered > 300


def test_exclusions_do_not_cover_everything() -> None:
    exclusions = Exclusions(["lm_head", "mlp.gate", "model.layers.1.", "self_attn*", "vision_tower*"])
    for name in ("model.layers.0.mlp.gate_proj", "model.layers.11.mlp.up_proj", "model.layers.0.mlp.experts.1.up_proj"):
        assert not exclusions.cover(name)
    assert EXPERT.fullmatch("model.layers.0.mlp.experts.1.up_proj")


def test_names_are_renamed_as_sglang_renames_them() -> None:
    """Nemotron's ``backbone.`` is SGLang's ``model.``, in exclusions and in the list of a mix."""
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptMixedPrecisionConfig
    from sglang.srt.models.utils import WeightsMapper

    from sglang_modelopt_ext.integration.config import ModelOptExtConfig

    section = {
        "quant_algo": "MIXED_PRECISION",
        "exclude_modules": ["backbone.layers.0.mixer.conv1d", "mtp*"],
        "quantized_layers": {
            "backbone.layers.0.mixer.in_proj": {"quant_algo": "FP8"},
            "backbone.layers.1.mixer.experts": {"quant_algo": "NVFP4", "group_size": 16},
        },
    }
    stock, ours = ModelOptMixedPrecisionConfig.from_config(section), ModelOptExtConfig.from_config(section)
    assert isinstance(ours, ModelOptExtConfig)
    for config in (stock, ours):
        config.apply_weight_name_mapper(WeightsMapper(orig_to_new_prefix={"backbone.": "model."}))
    for module, algo in (("layers.0.mixer.in_proj", "FP8"), ("layers.1.mixer.experts", "NVFP4")):
        found = ours.config.layer(f"model.{module}")
        assert found is not None
        assert found.algo == algo == stock._resolve_quant_algo(f"model.{module}")
    for module in ("model.layers.0.mixer.conv1d", "mtp.layers.0.fc"):
        assert stock.is_layer_excluded(module)
        assert ours.config.is_excluded(module)
