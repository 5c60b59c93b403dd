"""The owner of a checkpoint: flags, algorithms, GPUs, and rejected combinations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sglang_modelopt_ext.checkpoint import stock
from sglang_modelopt_ext.checkpoint.ownership import decide, owned_family
from sglang_modelopt_ext.checkpoint.tensors import stored_shape
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.table import FAMILIES, SCHEMES, UMBRELLA

CPU = Device.cpu()
DEVICES = (CPU, Device.cuda(90), Device.cuda(100))

MIXED_LAYERS = {
    "model.layers.0.mlp.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
    "model.layers.0.mlp.down_proj": {"quant_algo": "FP8"},
}


def checkpoint(folder: Path, section: dict[str, Any] | None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """Return a folder with configuration files and a few tensors."""
    (folder / "config.json").write_text("{}")
    if section is not None:
        content = {"producer": {"name": "modelopt"}, "quantization": section}
        (folder / "hf_quant_config.json").write_text(json.dumps(content))
    save_file(tensors or {"model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("algo", sorted(SCHEMES))
def test_on_a_cpu_every_algorithm_is_ours(tmp_path: Path, algo: str) -> None:
    scheme = SCHEMES[algo]
    folder = checkpoint(tmp_path, {"quant_algo": algo})
    for flag in {None, "modelopt", scheme.flag, scheme.stock_flag}:
        owned = owned_family(folder, flag, CPU)
        assert owned is not None
        assert owned[0] == scheme.flag
    umbrella = owned_family(folder, UMBRELLA, CPU)
    assert umbrella is not None
    assert umbrella[0] == UMBRELLA


@pytest.mark.parametrize("algo", sorted(SCHEMES))
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_on_a_gpu_what_sglang_serves_rightly_is_left_to_it(tmp_path: Path, algo: str, capability: int) -> None:
    scheme = SCHEMES[algo]
    folder = checkpoint(tmp_path, {"quant_algo": algo})
    left, device = (
        scheme.stock_capability is not None and capability >= scheme.stock_capability,
        Device.cuda(capability),
    )
    assert (owned_family(folder, None, device) is None) == left
    assert owned_family(folder, UMBRELLA, device) is not None, "asked for by name"


def test_smoothing_that_sglang_would_drop_makes_it_ours(tmp_path: Path) -> None:
    smoothed = {"model.layers.0.mlp.up_proj.pre_quant_scale": torch.ones(4)}
    assert owned_family(checkpoint(tmp_path, {"quant_algo": "FP8"}, smoothed), None, Device.cuda(90)) is not None


def test_group_32_is_ours(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {"quant_algo": "W4A16_NVFP4", "group_size": 32})
    assert owned_family(folder, None, Device.cuda(100)) is not None


@pytest.mark.parametrize(
    ("layers", "device", "ours"),
    [
        (MIXED_LAYERS, Device.cuda(100), False),
        (MIXED_LAYERS, CPU, True),
        ({"a": {"quant_algo": "FP8"}}, Device.cuda(100), True),
        ({**MIXED_LAYERS, "b": {"quant_algo": "MXFP8"}}, Device.cuda(100), False),
        ({**MIXED_LAYERS, "b": {"quant_algo": "FP8_PB_WO", "group_size": 128}}, Device.cuda(80), False),
        ({**MIXED_LAYERS, "b": {"quant_algo": "FP8_BLOCK_SCALES"}}, CPU, False),
        ({**MIXED_LAYERS, "b": {"quant_algo": "W4A16_NVFP4", "group_size": 32}}, Device.cuda(100), True),
        (MIXED_LAYERS, Device.cuda(80), False),
        ({**MIXED_LAYERS, "b": {"quant_algo": "W4A8_NVFP4_FP8", "group_size": 32}}, Device.cuda(100), True),
    ],
)
def test_mixed_precision(tmp_path: Path, layers: dict[str, Any], device: Device, ours: bool) -> None:
    folder = checkpoint(tmp_path, {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    for flag in (None, "modelopt_mixed", "unquant"):
        assert (owned_family(folder, flag, device) is not None) == ours


@pytest.mark.parametrize(("down", "ours"), [("NVFP4", False), ("FP8", True)])
def test_projections_of_an_expert_that_differ_make_it_ours(tmp_path: Path, down: str, ours: bool) -> None:
    """SGLang gives a layer's experts the method of the first projection it finds."""
    layers = {
        f"model.layers.0.mlp.experts.{number}.{name}": {"quant_algo": algo}
        for number in range(2)
        for name, algo in (("gate_proj", "NVFP4"), ("up_proj", "NVFP4"), ("down_proj", down))
    }
    folder = checkpoint(tmp_path, {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    assert (owned_family(folder, None, Device.cuda(100)) is not None) == ours


@pytest.mark.parametrize(("model_type", "ours"), [("mixtral", True), ("qwen3_moe", False)])
def test_a_mixtral_whose_attention_is_not_quantized_is_ours(tmp_path: Path, model_type: str, ours: bool) -> None:
    """SGLang 0.5.23 fails on it with an assertion."""
    section = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "model.layers.0.self_attn*"]}
    folder = checkpoint(tmp_path, section)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert (owned_family(folder, None, Device.cuda(100)) is not None) == ours


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("algo", ["NVFP4", "FP8"])
def test_gpt_oss_is_ours(tmp_path: Path, algo: str, capability: int) -> None:
    """SGLang 0.5.23 fails on its packed experts, even if they are not quantized."""
    section = {"quant_algo": algo, "group_size": 16 if algo == "NVFP4" else None, "exclude_modules": ["*mlp*"]}
    folder = checkpoint(tmp_path, section)
    for architecture, ours in (("GptOssForCausalLM", True), ("Qwen3MoeForCausalLM", False)):
        (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        assert (owned_family(folder, None, Device.cuda(capability)) is not None) == ours


@pytest.mark.parametrize("flag", ["modelopt_fp4", "modelopt_fp8", "fp8", "modelopt_mxfp4", "awq"])
def test_a_flag_that_does_not_fit_is_refused_with_the_one_that_does(tmp_path: Path, flag: str) -> None:
    folder = checkpoint(tmp_path, {"quant_algo": "W4A8_NVFP4_FP8"})
    message = rf"quant_algo: expected an algorithm of --quantization {flag}, got W4A8_NVFP4_FP8, which --quantization modelopt_w4a8"
    with pytest.raises(ModelOptExtError, match=message):
        owned_family(folder, flag, CPU)


def test_flags_that_sglang_corrects_are_none_and_those_that_requantize_are_its_own(tmp_path: Path) -> None:
    """SGLang replaces a flag by what it finds in the checkpoint, except where it asks for another format."""
    folder = checkpoint(tmp_path, {"quant_algo": "NVFP4_AWQ"})
    for flag in ("modelopt_fp8", "modelopt_mixed", "awq", "fp8"):
        assert owned_family(folder, flag, Device.cuda(100)) is None
        for device in (CPU, Device.cuda(90)):
            owned = owned_family(folder, flag, device)
            assert owned is not None
            assert owned[0] == UMBRELLA
    for flag in ("quark_mxfp4", "nvfp4_online", "w4afp8"):
        for device in DEVICES:
            assert owned_family(folder, flag, device) is None


@pytest.mark.parametrize("flag", ["modelopt_fp4", "awq"])
def test_flags_on_a_mix(tmp_path: Path, flag: str) -> None:
    """SGLang corrects flags where one layer is NVFP4; elsewhere it rejects them, and so does this package."""
    folder = checkpoint(tmp_path, {"quant_algo": "MIXED_PRECISION", "quantized_layers": MIXED_LAYERS})
    assert owned_family(folder, flag, Device.cuda(100)) is None
    assert owned_family(folder, flag, CPU) is not None
    layers = {"a": {"quant_algo": "FP8"}}
    folder = checkpoint(tmp_path, {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    with pytest.raises(ModelOptExtError, match=rf"--quantization {flag}, got MIXED_PRECISION, which .*modelopt_mixed"):
        owned_family(folder, flag, Device.cuda(100))


@pytest.mark.parametrize(("shape", "left"), [((2, 1, 4, 1), False), ((2, 4), True)])
@pytest.mark.parametrize("indexed", [False, True])
def test_block_scales_that_a_class_renames_are_left_in_its_own_shape(
    tmp_path: Path, shape: tuple[int, ...], left: bool, indexed: bool
) -> None:
    """SGLang's DeepSeek takes scales of tiles as ``[N / 128, K / 128]`` and stops at ModelOpt 0.47's."""
    module = "model.layers.0.self_attn.o_proj"
    layers = {module: {"quant_algo": "fp8_pb_wo"}, "model.layers.0.mlp.down_proj": {"quant_algo": "NVFP4"}}
    section = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    folder = checkpoint(tmp_path, section, {f"{module}.weight_scale": torch.ones(shape)})
    (folder / "config.json").write_text(json.dumps({"architectures": ["DeepseekV3ForCausalLM"]}))
    if indexed:
        index = {"weight_map": {f"{module}.weight_scale": "model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = decide(folder, None, Device.cuda(90))
    assert (found.family is None) == left
    assert left or "block scales of FP8_PB_WO in 2 dimensions" in found.why


def test_one_scale_of_each_algorithm_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large mix has tens of thousands of them in hundreds of files; those in tiles are found behind all others."""
    opened: list[str] = []

    def counted(folder: Path, name: str) -> tuple[int, ...] | None:
        opened.append(name)
        return stored_shape(folder, name)

    monkeypatch.setattr(stock, "stored_shape", counted)
    modules = [f"model.layers.{number}.self_attn.o_proj" for number in range(4)]
    layers = {name: {"quant_algo": "MXFP8"} for name in modules[:3]} | {modules[3]: {"quant_algo": "fp8_pb_wo"}}
    section = {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": layers | {"model.layers.0.mlp": {"quant_algo": "NVFP4"}},
    }
    scales = {f"{name}.weight_scale": torch.ones(2, 4) for name in modules[:3]}
    folder = checkpoint(tmp_path, section, scales | {f"{modules[3]}.weight_scale": torch.ones(2, 1, 4, 1)})
    (folder / "config.json").write_text(json.dumps({"architectures": ["DeepseekV3ForCausalLM"]}))
    assert "block scales of FP8_PB_WO in 2 dimensions" in decide(folder, None, Device.cuda(90)).why
    assert [name.split(".")[2] for name in opened] == ["0", "3"]


@pytest.mark.parametrize(("name", "left"), [("weight_scale", False), ("weight_scale_inv", True)])
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_block_scales_under_sglangs_name_are_sglangs(tmp_path: Path, name: str, left: bool, device: Device) -> None:
    scales = {f"b.{name}": torch.ones(2, 2)}
    for section in (
        {"quant_algo": "MXFP8"},
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {**MIXED_LAYERS, "b": {"quant_algo": "MXFP8"}}},
    ):
        assert (owned_family(checkpoint(tmp_path, section, scales), None, device) is None) == left


def test_unreadable_weights_are_no_error_here(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {"quant_algo": "FP8"})
    (folder / "model.safetensors").write_bytes(b"nothing")
    assert owned_family(folder, None, Device.cuda(90)) is None
    assert owned_family(folder, None, Device.cuda(80)) is not None


def test_our_flag_on_a_checkpoint_of_another_family(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {"quant_algo": "NVFP4"})
    with pytest.raises(
        ModelOptExtError,
        match=r"--quantization modelopt_w4a8, got NVFP4, which .*modelopt_ext or --quantization modelopt_fp4",
    ):
        owned_family(folder, "modelopt_w4a8", Device.cuda(100))


@pytest.mark.parametrize("flag", sorted(FAMILIES))
def test_our_flags_on_a_checkpoint_without_quantized_layers(tmp_path: Path, flag: str) -> None:
    with pytest.raises(ModelOptExtError, match=rf"--quantization {flag}: expected .*got an unquantized one"):
        owned_family(checkpoint(tmp_path, None), flag, CPU)


def test_models_that_are_not_modelopts_are_left_alone(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, None)
    assert owned_family(folder, None, CPU) is None
    assert owned_family(folder, "awq", CPU) is None


@pytest.mark.parametrize("device", [CPU, Device.cuda(100)], ids=lambda device: device.name)
@pytest.mark.parametrize("flag", [None, "modelopt", "modelopt_fp4", *FAMILIES])
def test_unknown_algorithms_are_sglangs_but_for_a_flag_of_ours(
    tmp_path: Path, flag: str | None, device: Device
) -> None:
    sections = (
        ({"quant_algo": "W2A2"}, r"quant_algo: expected one of FP8, .*MIXED_PRECISION.*, got W2A2"),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"model.mlp.up_proj": {"quant_algo": "W2A2"}}},
            r"quantized_layers\.model\.mlp\.up_proj: quant_algo: expected one of .*, got W2A2",
        ),
    )
    for section, message in sections:
        folder = checkpoint(tmp_path, section)
        if flag in FAMILIES:
            with pytest.raises(ModelOptExtError, match=message):
                decide(folder, flag, device)
        else:
            found = decide(folder, flag, device)
            assert found.family is None
            assert found.in_doubt
            assert re.search(message, found.why)


@pytest.mark.parametrize("algo", sorted(SCHEMES))
@pytest.mark.parametrize("change", [{"group_size": "16"}, {"exclude_modules": "lm_head"}, {"quantized_layers": [1]}])
def test_malformed_is_an_error_where_the_algorithm_can_only_be_ours(
    tmp_path: Path, algo: str, change: dict[str, Any]
) -> None:
    folder = checkpoint(tmp_path, {"quant_algo": algo, **change})
    if SCHEMES[algo].stock_flag is not None or algo == "MXFP8":
        assert decide(folder, None, Device.cuda(100)).in_doubt
    else:
        with pytest.raises(ModelOptExtError, match=next(iter(change))):
            decide(folder, None, Device.cuda(100))
    with pytest.raises(ModelOptExtError, match=next(iter(change))):
        decide(folder, UMBRELLA, Device.cuda(100))


JUNK = (None, True, 0, -1, 1.5, "", "text", [], [1], ["a", 2], {}, {"a": 1}, {"a": {"quant_algo": 4}}, {"a": [1]}, [[]])


@pytest.mark.parametrize("algo", ["NVFP4", "MIXED_PRECISION", "W2A2"])
@pytest.mark.parametrize(
    "name",
    [
        "quant_algo",
        "kv_cache_quant_algo",
        "kv_cache_scheme",
        "group_size",
        "config_groups",
        "exclude_modules",
        "ignore",
        "quantized_layers",
        "producer",
        "quant_method",
        "quantization",
        "text_config",
        "architectures",
        "model_type",
        "compression_config",
        "sglang_modelopt_ext",
    ],
)
def test_nothing_malformed_is_an_error_without_a_flag_of_ours(tmp_path: Path, name: str, algo: str) -> None:
    """A field of any type, in either file and at any level: SGLang may make something of it."""
    layers = {"quantized_layers": MIXED_LAYERS} if algo == "MIXED_PRECISION" else {}
    whole = {"quant_algo": algo, "group_size": 16, **layers}
    for junk in (*JUNK, {"kv_cache_recipe": []}, {"rounds_activations": "x"}, {"type": "float", "num_bits": []}):
        changed = {**whole, name: junk}
        for file, config in (
            ({"quantization": changed}, {}),
            ({"quantization": whole, name: junk}, {name: junk}),
            (changed, {"quantization_config": whole}),
            ({"quantization": whole}, {"quantization_config": changed, "architectures": ["A"]}),
            ({"quantization": junk}, {"quantization_config": junk}),
        ):
            (tmp_path / "hf_quant_config.json").write_text(json.dumps(file))
            (tmp_path / "config.json").write_text(json.dumps(config))
            for flag in (None, "modelopt_fp4"):
                decide(tmp_path, flag, Device.cuda(90))


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("flag", [None, "modelopt", "modelopt_ext"])
def test_a_checkpoint_that_quantizes_only_its_kv_cache_is_ours(
    tmp_path: Path, flag: str | None, device: Device
) -> None:
    folder = checkpoint(tmp_path, {"quant_algo": None, "kv_cache_quant_algo": "NVFP4"})
    owned = owned_family(folder, flag, device)
    assert owned is not None
    assert owned[0] == "modelopt_ext"


@pytest.mark.parametrize("flag", ["modelopt_w4a8", "modelopt_fp8", "awq"])
def test_other_flags_on_a_checkpoint_that_quantizes_only_its_kv_cache(tmp_path: Path, flag: str) -> None:
    folder = checkpoint(tmp_path, {"quant_algo": None, "kv_cache_quant_algo": "FP8"})
    if flag not in FAMILIES:
        assert owned_family(folder, flag, CPU) is None
        return
    with pytest.raises(ModelOptExtError, match=rf"an algorithm of --quantization {flag}, got null: only the KV cache"):
        owned_family(folder, flag, CPU)
