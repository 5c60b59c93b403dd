"""``quantize`` on every architecture of docs/quantize.md: its table says what can be exported, and what is exported is right.

Right means: the names are those of the model, what is not quantized is unchanged, and quantized weights decode to the model's.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("modelopt")

from sglang_modelopt_ext.checkpoint.packed import PackedProjection
from sglang_modelopt_ext.checkpoint.reader import check_all_values, read_checkpoint, standard_name
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.quantize.library import PTQ, library
from sglang_modelopt_ext.workflow.quantize.record import Selection
from tests.support.architectures import ARCHITECTURES, MULTIMODAL, architecture_dir
from tests.support.models import TinyModel, model_dir
from tests.support.quantizing import calibration_file, names, run
from tests.support.recipes import RECIPES
from tests.support.reference import QuantLinear

PAGE = Path(__file__).resolve().parents[2] / "docs" / "quantize.md"
HEADER = "| model | W4A8_NVFP4_FP8 | W4A8_MXFP4_FP8 | NVFP4 | NVFP4_AWQ_LITE |"
FAST = ("nemotron_h", "llama4", "gpt_oss", "qwen3_5_vl")
"""The architectures of ``make test``, with the recipes before the last: what ModelOpt names, packs, and loads otherwise."""
ROUNDING = 0.2
"""A bound of the relative error of a weight in four bits; a weight of another layer, or of other rows, is off by more than 1."""


def table() -> dict[tuple[str, str], str]:
    """Return the cells of the page's table by model and recipe."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(HEADER)
    recipes = [cell.strip() for cell in HEADER.strip("|").split("|")][1:]
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        model, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found |= {
            (name, recipe): cell
            for name in re.findall(r"`(\w+)`", model)
            for recipe, cell in zip(recipes, cells, strict=True)
        }
    return found


MODELS = {
    "nemotron_llama": "llama",
    "nemotron_vl": "llama",
    "nemotron": "nemotron_h",
    "qwen3_5_moe/ptq/nvfp4_experts_mse": "qwen3_5_moe_vl",
    "qwen3_5_moe": "qwen3_5_moe",
    "qwen3_5": "qwen3_5",
    "gemma4": "gemma4",
    "gemma": "gemma3",
    "minimax": "minimax_m2",
    "experts": "deepseek_v3",
    "step": "deepseek_v3",
}
"""By a part of a recipe file's name, the first that it has: the model to run it on; a Llama for others."""
TRAINS, OUTPUTS = "expected one that needs no training, got lsq", "expected no quantized output of a layer"
ELSEWHERE = "so nothing would be quantized"
REJECTED = {
    "general/qad/nvfp4_dual_lsq-mse_init-fp8_kv": TRAINS,
    "general/qad/nvfp4_lsq-mse_init-fp8_kv": TRAINS,
    "huggingface/nemotron_llama/ptq/fp8_output_quant_proj": OUTPUTS,
    "huggingface/nemotron_llama/ptq/nvfp4_output_quant_proj": OUTPUTS,
    "huggingface/diffusion_gemma/ptq/nvfp4_experts_only": ELSEWHERE,
    "huggingface/step3p7/ptq/nvfp4_experts_only-kv_fp8_cast": ELSEWHERE,
    "models/deepseek-ai/DeepSeek-V4-Pro-0813/ptq/nvfp4_experts_only": ELSEWHERE,
}
"""PTQ recipe files that do not run here, with the reason: those of ELSEWHERE name layers of models that transformers has not."""

TABLE = table()
CASES = [
    pytest.param(*case, marks=() if case[0] in FAST and case[1] != "NVFP4_AWQ_LITE" else pytest.mark.full)
    for case in TABLE
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return calibration_file(tmp_path_factory.mktemp("data"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_table_has_every_architecture() -> None:
    assert {name for name, _ in TABLE} == ARCHITECTURES.keys() | MULTIMODAL.keys()


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_architecture(name: str, recipe: str, data: str, tmp_path: Path) -> None:
    folder = architecture_dir(name)
    expected = TABLE[name, recipe]
    exclude = re.fullmatch(r"with `--exclude (\S+)`", expected)
    if expected.startswith("no") or exclude:
        with pytest.raises(ModelOptExtError, match=r"exclude") as caught:
            run(folder, tmp_path / "out", data, recipe)
        assert "\n" not in str(caught.value)
        assert ".partial" not in str(caught.value)
        assert not [file for file in names(tmp_path) if not file.startswith(".out.calibration")]
        if not exclude:
            return
    selection = Selection(exclude=(exclude[1],) if exclude else ())
    check_export(folder, run(folder, tmp_path / "out", data, recipe, selection=selection).exported.folder, recipe)


def check_export(source: Path, folder: Path, recipe: str) -> None:
    """Compare an export with its model, by an independent decoding."""
    model, exported = tensors(source), tensors(folder)
    checkpoint = read_checkpoint(folder)
    check_all_values(checkpoint)
    for file in ("config.json", "hf_quant_config.json"):
        assert "\\u0000" not in (folder / file).read_text(), "a left-over marker"
    scales = {
        t.name for linear in checkpoint.layers for part, t in linear.stored.items() if part not in ("weight", "bias")
    }
    assert exported.keys() - scales == model.keys()
    quantized = {linear.stored["weight"].name for linear in checkpoint.layers}
    assert quantized
    for tensor in model.keys() - quantized:
        same = torch.equal(exported[tensor].to(model[tensor].dtype), model[tensor])
        assert same or (recipe == "NVFP4_AWQ_LITE" and "norm" in tensor), tensor
    for linear in checkpoint.linears.values():
        parts = {standard_name(t.name).rpartition(".")[2]: exported[t.name] for t in linear.stored.values()}
        decoded = QuantLinear(RECIPES[linear.scheme.algo], parts, linear.scheme.weight.group_size, "exact", "recipe")
        weight, original = decoded.weight_parts.dequantized(), model[f"{linear.name}.weight"].float()
        if recipe == "NVFP4_AWQ_LITE":
            # Its columns are divided by a scale, and its rows multiplied by that of the layer behind: nothing else changes.
            assert 0.3 < float(weight.norm() / original.norm()) < 3, linear.name
            continue
        assert float((weight - original).norm() / original.norm()) < ROUNDING, linear.name
    for layer in checkpoint.experts.values():
        for projection in layer.packed.projections if layer.packed is not None else ():
            check_packed(projection, model[projection.stored["weight"].name], exported)


def check_packed(projection: PackedProjection, original: torch.Tensor, exported: dict[str, torch.Tensor]) -> None:
    """Compare the experts of a packed projection ``[E, K, N]`` with the model's, each by an independent decoding."""
    scheme = projection.one.scheme
    for expert in range(projection.count):
        stored = {
            name: projection.of_expert(name, exported[header.name], expert).contiguous()
            for name, header in projection.one.stored.items()
            if name != "bias"
        }
        decoded = QuantLinear(RECIPES[scheme.algo], stored, scheme.weight.group_size, "exact", "recipe")
        weight, expected = decoded.weight_parts.dequantized(), original[expert].T.float()
        assert float((weight - expected).norm() / expected.norm()) < ROUNDING, (projection.one.name, expert)


@pytest.mark.full
@pytest.mark.parametrize("recipe", [name for name, kind in library().items() if kind == PTQ])
def test_recipe_files(recipe: str, data: str, tmp_path: Path) -> None:
    """Every PTQ recipe of ModelOpt's library, on a model of its kind: quantized and read back, or rejected with its reason."""
    model = next((model for part, model in MODELS.items() if part in recipe.lower()), "llama")
    if recipe in REJECTED:
        with pytest.raises(ModelOptExtError, match=REJECTED[recipe]):
            run(architecture_dir(model), tmp_path / "out", data, recipe)
        return
    exported = run(architecture_dir(model), tmp_path / "out", data, recipe).exported
    assert exported.record.recipe == recipe
    assert exported.checkpoint.layers
    if "kv_fp8" in recipe or "kv_nvfp4" in recipe:
        assert exported.record.kv_cache_recipe == ("fp8" if "kv_fp8" in recipe else "nvfp4")


@pytest.mark.full
def test_smoothing_in_a_norm_that_adds_one(data: str, tmp_path: Path) -> None:
    """Qwen3.5's norms multiply by 1 + weight: norm times decoded weight is what it was, which ModelOpt 0.47 alone gets wrong."""
    folder = architecture_dir("qwen3_5")
    done = run(folder, tmp_path / "out", data, "NVFP4_AWQ_LITE", selection=Selection(exclude=("linear_attn",)))
    model, exported = tensors(folder), tensors(done.exported.folder)
    norm = "model.layers.1.post_attention_layernorm.weight"
    assert not torch.equal(model[norm], exported[norm])
    linear = done.exported.checkpoint.linears["layers.1.mlp.up_proj"]
    parts = {standard_name(t.name).rpartition(".")[2]: exported[t.name] for t in linear.stored.values()}
    decoded = QuantLinear(RECIPES[linear.scheme.algo], parts, 16, "exact", "recipe").weight_parts.dequantized()
    original = model[f"{linear.name}.weight"].float() * (1 + model[norm].float())
    assert float((decoded * (1 + exported[norm].float()) - original).norm() / original.norm()) < ROUNDING


def test_a_classifier_keeps_its_head(data: str, tmp_path: Path) -> None:
    """The automatic class for language models would take its body, and draw a head at random."""
    stored = tensors(run(model_dir(TinyModel("classifier")), tmp_path / "out", data, "W4A8_MXFP4_FP8").exported.folder)
    assert stored["score.weight"].dtype == torch.uint8
    assert not [name for name in stored if name.startswith("lm_head")]
