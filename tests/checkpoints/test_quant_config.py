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
    """Return a folder with the two files, each only where a section is given."""
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
        ({"kv_cache_scheme": "NVFP4"}, "kv_cache_quant_algo"),
        ({"quant_method": "awq"}, "quant_method"),
    ],
)
def test_files_that_disagree(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    write(tmp_path, FILE_SECTION, {**CONFIG_SECTION, **change})
    with pytest.raises(ModelOptExtError, match=rf"config\.json: .*{named}"):
        read_quant_config(tmp_path)


@pytest.mark.parametrize(
    ("file", "config", "expected"),
    [
        ({"kv_cache_quant_algo": "FP8"}, {}, ("FP8", 32)),
        ({}, {"kv_cache_scheme": {"type": "float", "num_bits": 8}}, ("FP8", 32)),
        ({}, {"kv_cache_scheme": {"type": "float", "num_bits": 4}}, ("NVFP4", 32)),
        ({}, {"kv_cache_scheme": None}, (None, 32)),
        ({"group_size": None}, {"group_size": 16}, (None, 16)),
    ],
)
def test_what_one_file_says_is_taken_from_it(
    tmp_path: Path, file: dict[str, Any], config: dict[str, Any], expected: tuple[str | None, int]
) -> None:
    section = {name: value for name, value in {**FILE_SECTION, **file}.items() if name != "kv_cache_quant_algo" or file}
    found = read_quant_config(write(tmp_path, section, {**CONFIG_SECTION, **config}))
    assert found is not None
    assert (found.kv_cache_algo, found.group_size) == expected
    assert found.algo == "W4A8_NVFP4_FP8"


def test_null_is_a_word(tmp_path: Path) -> None:
    """A file that says of the KV cache that it is not quantized contradicts one that says it is."""
    write(tmp_path, {**FILE_SECTION, "kv_cache_quant_algo": None}, {**CONFIG_SECTION, "kv_cache_scheme": "FP8"})
    with pytest.raises(ModelOptExtError, match=r"config\.json: kv_cache_quant_algo: expected None, as in .*, got FP8"):
        read_quant_config(tmp_path)


def test_layers_of_a_mix_in_one_file_only(tmp_path: Path) -> None:
    layers = {"quantized_layers": {"a": {"quant_algo": "FP8"}}}
    for number, (file, config) in enumerate((({}, layers), (layers, {}))):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder, {"quant_algo": "MIXED_PRECISION", **file}, {"quant_algo": "MIXED_PRECISION", **config})
        found = read_quant_config(folder)
        assert found is not None
        assert list(found.quantized_layers) == ["a"]


def test_exclusions_that_differ_are_decided_by_the_tensors(tmp_path: Path) -> None:
    """A module that only one file excludes is quantized if it has the tensors of a quantized layer."""
    found = read_quant_config(write(tmp_path, FILE_SECTION, {**CONFIG_SECTION, "ignore": ["lm_head", "mlp.gate"]}))
    assert found is not None
    assert found.exclude_modules == ("lm_head",)
    assert found.doubtful_modules == ("model.embed_tokens", "mlp.gate")
    (note,) = found.notes
    assert (
        "config.json: ignore differs from exclude_modules of hf_quant_config.json in model.embed_tokens, mlp.gate"
        in note
    )
    for module in ("model.embed_tokens", "model.layers.3.mlp.gate"):
        assert found.layer(module) is None
        assert found.layer(module, stored=True) is not None
    assert found.layer("lm_head", stored=True) is None
    assert found.layer("model.layers.3.mlp.up_proj") is not None


@pytest.mark.parametrize("config_section", [None, CONFIG_SECTION])
def test_an_empty_section_says_nothing(tmp_path: Path, config_section: dict[str, Any] | None) -> None:
    found = read_quant_config(write(tmp_path, {}, config_section))
    assert (found is None) == (config_section is None)


@pytest.mark.parametrize(
    "section",
    [{"quant_method": "fp8"}, {"quant_method": "compressed-tensors", "config_groups": {}}, {"bits": 4}, {}, "text"],
)
@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config"])
def test_another_method_beside_a_left_over_file(tmp_path: Path, place: str, section: object) -> None:
    write(tmp_path, FILE_SECTION)
    config = {place: section if place != "text_config" else {"quantization_config": section}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelOptExtError, match=r"config\.json: quantization_config\.quant_method: expected modelopt"):
        read_quant_config(tmp_path)
    (tmp_path / "hf_quant_config.json").unlink()
    assert read_quant_config(tmp_path) is None


def test_names_that_a_model_renames(tmp_path: Path) -> None:
    """SGLang's classes for models of Nemotron rename modules by ``hf_to_sglang_mapper``."""
    section = {
        "quant_algo": "MIXED_PRECISION",
        "exclude_modules": ["backbone.layers.0.mixer.conv1d", "mtp*"],
        "quantized_layers": {"backbone.layers.0.mixer.in_proj": {"quant_algo": "FP8"}},
    }
    found = read_quant_config(write(tmp_path, section))
    assert found is not None
    renamed = found.renamed(lambda name: None if name.startswith("mtp") else name.replace("backbone.", "model."))
    for config, module in (
        (found, "backbone.layers.0.mixer"),
        (renamed, "backbone.layers.0.mixer"),
        (renamed, "model.layers.0.mixer"),
    ):
        assert config.is_excluded(f"{module}.conv1d")
        assert config.layer(f"{module}.in_proj") is not None
    assert not found.is_excluded("model.layers.0.mixer.conv1d")
    assert found.layer("model.layers.0.mixer.in_proj") is None
    assert renamed.is_excluded("mtp.layers.0.fc")


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
        ("model.layers.1.", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1.", "model.layers.11.mlp.up_proj", False),
        ("model.layers.1", "vision_tower.layers.1.mlp.up_proj", False),
        ("self_attn", "model.layers.0.self_attn.q_proj", True),
        ("self_attn*", "model.layers.0.self_attn.q_proj", True),
        ("self_attn", "model.layers.0.self_attn_norm", False),
        ("*self_attn.qkv_proj", "model.layers.0.self_attn.k_proj", True),
        ("*self_attn.qkv_proj", "model.layers.0.self_attn.o_proj", False),
        ("*.gate_up_proj", "model.layers.0.mlp.experts.3.up_proj", False),
        ("mlp.gate", "model.layers.0.mlp.gate", True),
        ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("mlp.gate", "language_model.model.layers.0.mlp.gate", True),
        ("*language_model*self_attn*", "model.language_model.layers.0.self_attn.o_proj", True),
        ("*language_model*self_attn*", "language_model.model.layers.0.self_attn.o_proj", True),
        ("*language_model*self_attn*", "model.language_model.layers.0.mlp.up_proj", False),
        ("language_model.lm_head", "lm_head", True),
        ("mtp*", "mtp.layers.0.mlp.up_proj", True),
        ("mtp*", "model.layers.0.mlp.up_proj", False),
        ("model.layers.[01].mlp", "model.layers.1.mlp", True),
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
