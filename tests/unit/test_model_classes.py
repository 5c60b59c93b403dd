"""The walk over SGLang's model classes: no class is forgotten, described exports are real ones, and a sample is walked again."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sglang_modelopt_ext.checkpoint.tensors import read_headers
from tests.model_classes.configs import meta_model
from tests.model_classes.export import RECIPES, quantized
from tests.model_classes.registry import registered_classes
from tests.support.expert_models import Kind
from tests.support.expert_models import model_dir as expert_model_dir
from tests.support.exports import Variant, export
from tests.support.models import Family, TinyModel, model_dir

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = {
    "BertModel": "a pooler that SGLang's class has not, and a parameter of positions that nobody stores",
    "DeepseekV3ForCausalLM": "latent attention; its class asks a layer's method for blocks",
    "Llama4ForConditionalGeneration": "rows of q and k that its class reorders, packed experts, a tower that it skips",
    "HYV3ForCausalLM": "names of layers that begin with a dot",
    "NemotronHForCausalLM": "experts without a gate",
    "PhiForCausalLM": "a class that collects all tensors first, and gives its layers no names",
    "Qwen3_5ForConditionalGeneration": "sizes of a vision tower that SGLang enlarges on a CPU",
}
"""Classes that are walked again, each with what it needs."""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    if str(ROOT / "tools") not in sys.path:
        sys.path.append(str(ROOT / "tools"))
    return importlib.import_module("model_classes")


@pytest.fixture(scope="module")
def results(tool: ModuleType) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(tool.RESULTS.read_text(encoding="utf-8"))
    return content


def test_no_class_is_forgotten(results: dict[str, Any]) -> None:
    """A class that another SGLang registers is walked, or this fails."""
    assert sorted(results["classes"]) == sorted(registered_classes())


def test_every_class_loads_or_has_a_reason(results: dict[str, Any], tool: ModuleType) -> None:
    for name, found in results["classes"].items():
        assert found.get("loads") or found["export"], name
        assert all(reason for reason in found.get("loads", {}).values()), name


def test_served_classes_load(results: dict[str, Any], tool: ModuleType) -> None:
    for name, test in tool.SERVED.items():
        assert tool.LOADED in results["classes"][name]["loads"].values(), name
        assert (ROOT / test).exists(), test


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "glm4", "qwen3_moe", "mixtral"])
def test_a_described_export_is_a_real_one(family: Family) -> None:
    """Names, types and shapes are those that ModelOpt writes, and so are the algorithm and the excluded modules."""
    check_described(export(model_dir(TinyModel(family)), RECIPES[0].preset))


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4"])
def test_described_packed_experts_are_those_of_quantize(kind: Kind) -> None:
    check_described(export(expert_model_dir(kind), RECIPES[0].preset, Variant(along_k=True)))


def check_described(folder: Path) -> None:
    """Compare an export by the first recipe with the walk's description of its model."""
    import transformers

    recipe = RECIPES[0]
    config = transformers.AutoConfig.from_pretrained(folder)
    model = meta_model(config.architectures[0], config)
    assert model is not None
    tensors, section = quantized(model, recipe)
    stored = {
        name: (one.dtype, one.shape) for name, one in read_headers(folder).items() if not name.endswith("inv_freq")
    }
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert described.keys() == stored.keys()
    # A scale of one value is stored as [] or [1]; the model's own type is the file's.
    differ = {
        name: (described[name], stored[name])
        for name in stored
        if described[name] != stored[name] and not (stored[name][1] in ((), (1,)) and described[name][1] in ((), (1,)))
    }
    assert not differ
    real = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert section["quant_algo"] == real["quant_algo"]
    assert sorted(section["exclude_modules"]) == sorted(real["exclude_modules"])


def walk_again(classes: tuple[str, ...], tmp_path: Path, *more: str) -> dict[str, Any]:
    """Return what the walk finds of ``classes`` now."""
    file = tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "tests" / "model_classes"), *classes, "--results", str(file), *more]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found: dict[str, Any] = json.loads(file.read_text())["classes"]
    return found


def test_a_sample_is_found_again(results: dict[str, Any], tmp_path: Path) -> None:
    recipe = RECIPES[0].algo
    found = walk_again(tuple(SAMPLE), tmp_path, "--only", recipe)
    for name in SAMPLE:
        assert found[name]["loads"][recipe] == "loads", name
        assert found[name].get("builds") == results["classes"][name].get("builds"), name
        assert found[name].get("kv_cache") == results["classes"][name].get("kv_cache"), name


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_all_classes_are_found_again(results: dict[str, Any], tmp_path: Path) -> None:
    found = walk_again((), tmp_path)
    assert found == results["classes"]


def test_a_described_export_has_no_values(tmp_path: Path) -> None:
    """It takes no room: holes are not stored."""
    from tests.model_classes.export import write

    folder = model_dir(TinyModel("llama"))
    config = importlib.import_module("transformers").AutoConfig.from_pretrained(folder)
    model = meta_model("LlamaForCausalLM", config)
    assert model is not None
    write(tmp_path / "export", model, RECIPES[0])
    assert sum(file.stat().st_blocks * 512 for file in (tmp_path / "export").iterdir()) < 2**20
    assert all(tensor.is_meta for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4"])
def test_real_exports_with_packed_experts_load(kind: str, tmp_path: Path) -> None:
    """All of gpt-oss: packed experts with biases, quantized attention, and sinks that its class copies past the loaders.

    Its class rejects the attention of a CPU, and is rehearsed with another.
    """
    folder = export(expert_model_dir(kind), "FP8_PER_CHANNEL_PER_TOKEN_CFG")
    module = "sglang_modelopt_ext.integration.rehearsal"
    command = [sys.executable, "-m", module, str(folder)]
    output = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    found = json.loads(output.splitlines()[-1].removeprefix("REHEARSAL "))
    assert found["problems"] == found["missing"] == found["left_over"] == []
