"""``auto-quantize --recipe``: ModelOpt's search recipes, run whole, and compared with ModelOpt's own run of the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("modelopt")

from sglang_modelopt_ext.checkpoint.names import canonical_name
from sglang_modelopt_ext.checkpoint.reader import check_all_values, read_checkpoint
from sglang_modelopt_ext.cli.main import main
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant.formats import find_formats, try_format
from sglang_modelopt_ext.workflow.autoquant.layers import plan_groups, read_linears
from sglang_modelopt_ext.workflow.autoquant.measure import load_texts, part
from sglang_modelopt_ext.workflow.autoquant.rules import BASELINE, Rules, Space, read_search
from sglang_modelopt_ext.workflow.autoquant.state import Group, Report, read_report
from sglang_modelopt_ext.workflow.common.base_model import load_model
from sglang_modelopt_ext.workflow.common.text import load_tokenizer, spread
from sglang_modelopt_ext.workflow.quantize.library import SEARCH, files, library
from sglang_modelopt_ext.workflow.quantize.record import read_record
from tests.support.models import TinyModel, model_dir
from tests.support.moe import tiny

TEXT = Path(__file__).resolve().parents[2] / "examples/stdlib_lm/heldout.txt"
SPACES = "huggingface/qwen3_6_moe/auto_quantize/w4a16_nvfp4_fp8_module_spaces_at_6p0bits-active_moe"
ACTIVE = "general/auto_quantize/w4a16_nvfp4_fp8_at_6p0bits-active_moe"
NVFP4_FP8 = "general/auto_quantize/nvfp4_fp8_at_5p4bits"
FILE = files()["models/meta-models/Muse-Glimmer-30B/auto_quantize/w4a16_nvfp4_4o6_mixed"]
SAMPLES, SCORED = 8, 4
SM90 = Device.parse("sm90")


def search(model: Path, recipe: str, output: Path, *more: str) -> Report:
    """Run a recipe on a few short windows and return what it wrote."""
    fixed = {"--recipe": recipe, "--data": str(TEXT), "--gpu": "sm90", "--device": "cpu", "--output": str(output)}
    sizes = {"--samples": str(SAMPLES), "--score-samples": str(SCORED), "--sequence-length": "48"}
    words = [word for pair in (fixed | sizes).items() for word in pair]
    assert main(["auto-quantize", str(model), *words, *more]) == 0
    return read_report(output / "autoquant.json")


def modelopts_own(model: Path, recipe: str, loss_scale: float) -> dict[str, dict[str, Any]]:
    """Return what ModelOpt's own search by the recipe finds on the same windows: by group, its formats, scores and costs."""
    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe

    described = load_recipe(recipe)
    section = described.auto_quantize
    calibration, _ = load_texts(
        [str(TEXT)], [], load_tokenizer(model), samples=SAMPLES, sequence_length=48, seed=0, progress=False
    )
    scored = part(calibration, spread(calibration.windows, SCORED))
    batches = {False: calibration.batches(), True: scored.batches()}
    loaded, _ = load_model(model, "cpu", progress=False)

    def loss(logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return loss_scale * torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten()
        )

    class Loader:
        def __iter__(self) -> Any:
            return iter(batches[torch.is_grad_enabled()])

    def forward(model: Any, batch: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch, use_cache=False).logits
        return logits

    constraints = section.constraints.model_dump(exclude_none=True)
    constraints.setdefault("cost", {})["excluded_module_name_patterns"] = section.cost_excluded_layers
    _, state = mtq.auto_quantize(
        loaded,
        constraints=constraints,
        quantization_formats=[config.model_dump() for config in section.candidate_formats] or None,
        data_loader=Loader(),
        forward_step=forward,
        loss_func=loss,
        disabled_layers=section.disabled_layers,
        num_calib_steps=len(calibration.batches()),
        num_score_steps=len(scored.batches()),
        method=section.auto_quantize_method,
        module_search_spaces=[
            {
                "module_name_patterns": space.module_name_patterns,
                "quantization_formats": [config.model_dump() for config in space.candidate_formats],
                "allow_no_quant": space.allow_no_quant,
            }
            for space in section.module_search_spaces
        ],
        fixed_quantization_config=None if described.quantize is None else described.quantize.model_dump(),
    )
    return {row["module_names"][0]: row for row in state["candidate_stats"].values()}


@pytest.mark.full
@pytest.mark.parametrize("recipe", [ACTIVE, SPACES])
def test_a_mixture_by_recipe(recipe: str, tmp_path: Path) -> None:
    """Groups, choices, factors of the cost and scores are those of ModelOpt's own run; the export is what was chosen."""
    model = model_dir(tiny("qwen3_moe"))
    report = search(model, recipe, tmp_path / "out")
    state, (result,) = report.state, report.results
    own = modelopts_own(model, recipe, state.loss_scale)
    assert {group.modules[0] for group in state.groups} == own.keys()
    for group in state.groups:
        row = own[group.modules[0]]
        assert group.weight == row["cost_weight"]
        assert list(group.modules) == row["module_names"]
        assert ("none" in group.candidates) == row["allow_no_quant"]
        assert len(group.candidates) == len(row["formats"])
        assert (group.candidates.keys() == {BASELINE}) == row["is_fixed"]
        plain = sum(layer.weights for layer in group.layers) * group.weight
        assert row["uncompressed_cost"] == pytest.approx(plain)
        scores = sorted(candidate.score or 0.0 for candidate in group.candidates.values())
        # ModelOpt takes the score of the next cheaper format where that is lower.
        assert scores == pytest.approx(sorted(score / state.loss_scale**2 for score in row["scores"]), rel=1e-5)
    assert state.recipe == recipe
    assert result.choice.bits <= 6.0
    assert result.measured.stored_bits == pytest.approx(result.choice.bits, abs=1e-9)
    checkpoint = read_checkpoint(tmp_path / "out")
    check_all_values(checkpoint)
    algos = {row.name: row.algo for row in state.formats}
    for group in state.groups:
        expected = algos.get(result.choice.formats[group.name])
        if group.layers[0].experts:
            experts = checkpoint.experts.get(canonical_name(group.name))
            assert (experts.down.algo if experts else None) == expected
            continue
        for name in group.modules:
            linear = checkpoint.linears.get(canonical_name(name))
            assert (linear.scheme.algo if linear else None) == expected
    assert {group.weight for group in state.groups if group.layers[0].experts} == {0.03125}
    kv = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["kv_cache_quant_algo"]
    assert kv == ("FP8" if recipe == SPACES else None), "the baseline's"


@pytest.mark.full
def test_a_dense_model_by_recipe(tmp_path: Path) -> None:
    """The head is searched over as in ModelOpt; the state has the recipe, and new targets are exported from it."""
    model = model_dir(TinyModel(layers=2))
    report = search(model, NVFP4_FP8, tmp_path / "out")
    state, (result,) = report.state, report.results
    assert (state.recipe, state.method, state.lm_head, result.choice.target) == (NVFP4_FP8, "gradient", "searched", 5.4)
    assert result.choice.formats["lm_head"] in ("NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG")
    assert result.measured.stored_bits == result.choice.bits
    assert "lm_head" in read_checkpoint(tmp_path / "out").linears
    again = ["--from-state", str(tmp_path / "out" / "autoquant.json"), "--bits", "5.4", "--device", "cpu"]
    assert main(["auto-quantize", str(model), *again, "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


@pytest.mark.full
def test_a_dense_baseline_by_recipe(tmp_path: Path) -> None:
    """Muse-Glimmer's recipe under the names of a Llama, with the first layer's MLP left to its baseline."""
    text = FILE.read_text().replace("language_model.layers", "layers")
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace('- "*layers.*.mlp*"', '- "*layers.1.mlp*"'))
    report = search(model_dir(TinyModel(layers=2)), str(file), tmp_path / "out")
    state, (result,) = report.state, report.results
    fixed = {group.name for group in state.groups if group.candidates.keys() == {BASELINE}}
    assert fixed == {"model.layers.0.mlp", "model.layers.0.mlp.down_proj"}
    assert result.choice.bits <= 5.5
    assert result.measured.stored_bits == pytest.approx(result.choice.bits, abs=1e-9)
    checkpoint = read_checkpoint(tmp_path / "out")
    check_all_values(checkpoint)
    assert checkpoint.linears["layers.0.mlp.down_proj"].scheme.describe() == (
        "W4A16_NVFP4 (weights nvfp4, activations none)"
    )
    record = read_record(tmp_path / "out")
    assert record is not None
    assert BASELINE in {step["format"] for step in record.algorithm}


@pytest.fixture(scope="module")
def mixture() -> Any:
    return read_linears(model_dir(tiny("qwen3_moe")))


def plan(linears: Any, rules: Rules, formats: tuple[str, ...] = ("W4A8_NVFP4_FP8", "FP8")) -> dict[str, Group]:
    """Return the groups of a plan by name."""
    found = find_formats(formats, "cpu")
    return {group.name: group for group in plan_groups(linears, found, SM90, rules, [c.name for c in found])[1]}


@pytest.mark.parametrize("recipe", [name for name, kind in library().items() if kind == SEARCH])
def test_every_search_has_a_plan(recipe: str) -> None:
    """On a dense model or a mixture, by its names of modules; Muse-Glimmer's are of a model that transformers has not."""
    found = read_search(recipe)
    linears = read_linears(model_dir(tiny("qwen3_moe") if "moe" in recipe else TinyModel(layers=2)))
    formats = [try_format(name, config, "cpu") for name, config in found.formats.items()]
    if "Muse-Glimmer" in recipe:
        with pytest.raises(
            ModelOptExtError,
            match=r"--recipe: quantize: expected layers .* These patterns asked for it: \*language_model",
        ):
            plan_groups(linears, formats, SM90, found.rules, found.all_layers)
        return
    rows, groups, _ = plan_groups(linears, formats, SM90, found.rules, found.all_layers)
    assert {row.name for row in rows} - {BASELINE} == found.formats.keys()
    assert all(group.is_searched or group.candidates.keys() == {BASELINE} for group in groups)


def test_patterns(mixture: Any) -> None:
    rules = Rules(
        disabled=("*layers.0.self_attn.k_proj",),
        spaces=(Space(("*.experts",), ("FP8_DEFAULT_CFG",), False), Space(("lm_head",), ("FP8_DEFAULT_CFG",), True)),
        cost_model="active_moe",
        cost={"excluded_module_name_patterns": ["*layers.1.self_attn.o_proj"]},
        lm_head="searched",
    )
    groups = plan(mixture, rules)
    both = {"W4A8_NVFP4_FP8_CFG", "FP8_DEFAULT_CFG", "none"}
    assert groups["model.layers.0.self_attn"].candidates.keys() == {"none"}, "one of its layers is disabled"
    assert groups["model.layers.1.self_attn"].candidates.keys() == both
    assert groups["model.layers.0.mlp.experts"].candidates.keys() == {"FP8_DEFAULT_CFG"}
    assert groups["model.layers.0.mlp.experts"].weight == 0.5, "two of four experts, by the model's configuration"
    assert groups["lm_head"].candidates.keys() == {"FP8_DEFAULT_CFG", "none"}
    assert groups["model.layers.1.self_attn.o_proj"].weight == 0.0
    assert groups["model.layers.1.self_attn.o_proj"].candidates.keys() == both, "searched over, and not counted"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Rules(spaces=(Space(("*k_proj",), ("FP8_DEFAULT_CFG",), True),)), "partially matches runtime-grouped modules"),
        (Rules(spaces=(Space(("*q_proj", "*k_proj", "*v_proj"), ("FP8_DEFAULT_CFG",), True),) * 2), "Multiple"),
        (Rules(cost_model="active_moe", cost={"active_moe_expert_ratio": 2.0}), "active_moe_expert_ratio"),
    ],
)
def test_rules_that_are_refused(mixture: Any, rules: Rules, message: str) -> None:
    with pytest.raises(ModelOptExtError, match=message):
        plan(mixture, rules)


def test_a_tied_head_stays_unquantized_and_counts() -> None:
    groups = plan(read_linears(model_dir(TinyModel(tied=True))), Rules(lm_head="searched"))
    assert groups["lm_head"].candidates.keys() == {"none"}


def own_recipe(folder: Path, **sections: Any) -> str:
    """Write a search over NVFP4 with more sections, and return its path."""
    import modelopt.torch.quantization as mtq

    nvfp4 = json.loads(json.dumps(mtq.FP8_DEFAULT_CFG))
    content = {
        "metadata": {"recipe_type": "auto_quantize"},
        "auto_quantize": {"constraints": {"effective_bits": 9.0}, "candidate_formats": [nvfp4], **sections},
    }
    file = folder / "mine.yaml"
    file.write_text(json.dumps(content))
    return str(file)


def test_sections_that_are_refused(tmp_path: Path) -> None:
    import modelopt.torch.quantization as mtq

    read_search(own_recipe(tmp_path))
    with pytest.raises(ModelOptExtError, match=r"auto_quantize\.kv_cache: expected no such section"):
        read_search(own_recipe(tmp_path, kv_cache={"quant_cfg": [], "algorithm": "max"}))
    with pytest.raises(ModelOptExtError, match=r"a recipe ModelOpt can load, got .*scoresize"):
        read_search(own_recipe(tmp_path, scoresize=3))
    wrong = {**mtq.W4A8_NVFP4_FP8_CFG, "effective_bits": 4.0}
    with pytest.raises(ModelOptExtError, match=r"effective_bits: expected 4\.25, the bits that are stored, got 4\.0"):
        try_format("CANDIDATE", wrong, "cpu")


@pytest.mark.parametrize(
    ("flag", "value"), [("--formats", "FP8"), ("--method", "kl_div"), ("--lm-head", "counted"), ("--exclude", "x")]
)
def test_options_that_a_recipe_has(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["auto-quantize", "model", "--recipe", ACTIVE, "--data", "f.txt", "--output", "out", flag, value]
    assert main(words) == 2
    assert f"command line: {flag}: expected no such flag beside --recipe" in capsys.readouterr().err
