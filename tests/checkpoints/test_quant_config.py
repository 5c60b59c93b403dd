"""Reading the configuration of a checkpoint: both files, every form ModelOpt writes, and what must not pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_modelopt_ext.checkpoint.names import canonical_name, matches
from sglang_modelopt_ext.checkpoint.quant_config import parse_quant_config, read_quant_config
from sglang_modelopt_ext.errors import ModelOptExtError

FILE_SECTION: dict[str, Any] = {
    "quant_algo": "W4A8_NVFP4_FP8",
    "kv_cache_quant_algo": None,
    "group_size": 32,
    "exclude_modules": ["lm_head", "model.embed_tokens"],
}
CONFIG_SECTION: dict[str, Any] = {
    "quant_algo": "W4A8_NVFP4_FP8",
    "ignore": ["lm_head", "model.embed_tokens"],
    "quant_method": "modelopt",
    "producer": {"name": "modelopt", "version": "0.47.0"},
}


def write(folder: Path, section: object = None, config_section: object = None) -> Path:
    """A folder with the two files, each only where a section is given."""
    if section is not None:
        content = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": section}
        (folder / "hf_quant_config.json").write_text(json.dumps(content))
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    if config_section is not None:
        config["quantization_config"] = config_section
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("files", ["both", "hf_quant_config", "config"])
def test_reads_either_file_or_both(tmp_path: Path, files: str) -> None:
    write(tmp_path, FILE_SECTION if files != "config" else None, CONFIG_SECTION if files != "hf_quant_config" else None)
    config = read_quant_config(tmp_path)
    assert config is not None
    assert config.algo == "W4A8_NVFP4_FP8"
    assert config.group_size == (None if files == "config" else 32)
    assert config.is_excluded("lm_head")
    assert config.layer("model.embed_tokens") is None
    layer = config.layer("model.layers.0.mlp.down_proj")
    assert layer is not None
    assert layer.algo == "W4A8_NVFP4_FP8"


def test_no_modelopt_configuration_is_none(tmp_path: Path) -> None:
    assert read_quant_config(write(tmp_path)) is None
    assert read_quant_config(write(tmp_path, None, {"quant_method": "awq", "bits": 4})) is None


@pytest.mark.parametrize("algo", ["w4a8_nvfp4_fp8", "W4a8_NvFp4_Fp8"])
def test_algo_in_any_case(tmp_path: Path, algo: str) -> None:
    config = read_quant_config(write(tmp_path, {**FILE_SECTION, "quant_algo": algo}))
    assert config is not None
    assert config.algo == "W4A8_NVFP4_FP8"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quant_algo": "W4A8_MXFP4_FP8"}, "quant_algo"),
        ({"group_size": 16}, "group_size"),
        ({"ignore": ["lm_head"]}, "ignore"),
        ({"kv_cache_scheme": "NVFP4"}, "kv_cache_quant_algo"),
        ({"quant_method": "awq"}, "quant_method"),
    ],
)
def test_files_that_disagree(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    write(tmp_path, FILE_SECTION, {**CONFIG_SECTION, **change})
    with pytest.raises(ModelOptExtError, match=rf"config\.json: .*{named}"):
        read_quant_config(tmp_path)


@pytest.mark.parametrize("value", [0, -32, "32", 32.0, True, [32]])
def test_malformed_group_size(tmp_path: Path, value: object) -> None:
    write(tmp_path, {**FILE_SECTION, "group_size": value})
    with pytest.raises(ModelOptExtError, match=r"hf_quant_config\.json: group_size: expected a positive integer"):
        read_quant_config(tmp_path)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"quant_algo": 4}, "quant_algo"),
        ({"quant_algo": ""}, "quant_algo"),
        ({"group_size": 32}, "quant_algo"),
        ({**FILE_SECTION, "exclude_modules": "lm_head"}, "exclude_modules"),
        ({**FILE_SECTION, "exclude_modules": [1]}, "exclude_modules"),
        ({**FILE_SECTION, "kv_cache_quant_algo": 8}, "kv_cache_quant_algo"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": ["a"]}, "quantized_layers"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"group_size": 16}}}, r"quantized_layers\.a"),
    ],
)
def test_malformed_fields(tmp_path: Path, section: dict[str, Any], named: str) -> None:
    write(tmp_path, section)
    with pytest.raises(ModelOptExtError, match=rf"hf_quant_config\.json: (quantization\.)?{named}"):
        read_quant_config(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"'])
@pytest.mark.parametrize("name", ["hf_quant_config.json", "config.json"])
def test_files_that_are_no_json_object(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path, FILE_SECTION, CONFIG_SECTION)
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelOptExtError, match=rf"{name}: file: expected a JSON object"):
        read_quant_config(tmp_path)


def test_group_size_of_the_converted_form() -> None:
    group = {"weights": {"num_bits": 4, "type": "float", "group_size": 32}, "targets": ["Linear"]}
    config = parse_quant_config({**CONFIG_SECTION, "config_groups": {"group_0": group}}, Path("config.json"))
    assert config.group_size == 32


def test_mixed_precision_layers_and_guessed_groups() -> None:
    section = {
        "quant_algo": "MIXED_PRECISION",
        "config_groups": {"group_0": {"weights": {"group_size": 16}}},
        "quantized_layers": {"model.layers.0.mlp.up_proj": {"quant_algo": "w4a8_nvfp4_fp8", "group_size": 32}},
    }
    config = parse_quant_config(section, Path("config.json"))
    assert config.group_size is None
    layer = config.layer("language_model.model.layers.0.mlp.up_proj")
    assert layer is not None
    assert (layer.algo, layer.group_size) == ("W4A8_NVFP4_FP8", 32)
    assert config.layer("model.layers.1.mlp.up_proj") is None


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("model.language_model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("language_model.model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
        ("lm_head", "lm_head"),
        ("model", "model"),
    ],
)
def test_canonical_names(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        ("model.layers.0.self_attn*", "model.layers.0.self_attn.q_proj", True),
        ("model.layers.0.self_attn*", "model.layers.10.self_attn.q_proj", False),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.11.mlp.up_proj", False),
        ("model.language_model.layers.0.*", "language_model.model.layers.0.mlp.up_proj", True),
        ("*.down_proj", "model.layers.3.mlp.down_proj", True),
        ("lm_head", "lm_head", True),
        ("nothing.like.it", "lm_head", False),
    ],
)
def test_exclusion_patterns(pattern: str, module: str, expected: bool) -> None:
    assert matches(pattern, module) is expected


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts", "model.layers.0.mlp.experts.2.up_proj"])
def test_a_mix_lists_experts_together_or_one_by_one(name: str) -> None:
    section = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {name: {"quant_algo": "NVFP4", "group_size": 16}}}
    config = parse_quant_config(section, Path("hf_quant_config.json"))
    listed = config.layer("model.layers.0.mlp.experts.2.up_proj")
    assert listed is not None
    assert (listed.algo, listed.group_size) == ("NVFP4", 16)
    assert (config.layer("model.layers.0.mlp.experts.1.up_proj") is None) == name.endswith("up_proj")
    for other in ("model.layers.1.mlp.experts.2.up_proj", "model.layers.0.mlp.shared_experts.up_proj"):
        assert config.layer(other) is None
