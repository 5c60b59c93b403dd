"""The KV cache in a search: scores against their definition, choices against every choice, and real exports."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("modelopt")

from sglang_modelopt_ext.checkpoint.kv_cache import read_plan
from sglang_modelopt_ext.checkpoint.quant_config import read_quant_config
from sglang_modelopt_ext.checkpoint.tensors import read_headers, read_tensors
from sglang_modelopt_ext.cli.main import main
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant import run as autoquant
from sglang_modelopt_ext.workflow.autoquant.kv import Measured, cache_rounded, chosen_cache, search_cache
from sglang_modelopt_ext.workflow.autoquant.kv_choice import choose_kv
from sglang_modelopt_ext.workflow.autoquant.measure import perplexity
from sglang_modelopt_ext.workflow.autoquant.state import KVChoice, KVLayer, KVSearch, State, read_report
from sglang_modelopt_ext.workflow.common.base_model import load_model
from sglang_modelopt_ext.workflow.common.text import load_tokenizer
from sglang_modelopt_ext.workflow.quantize.record import read_record
from sglang_modelopt_ext.workflow.verify.reference import ReferenceModel
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES
from tests.support import edits
from tests.support.models import TinyModel, model_dir
from tests.unit.test_autoquant_run import arguments, failure, texts
from tests.unit.test_autoquant_state import TWO

RECIPES = ("nvfp4", "fp8")
CACHE = ("--kv-formats", "fp8,nvfp4", "--kv-bits", "6.25")


@pytest.fixture(scope="module")
def model() -> Path:
    return model_dir(TinyModel(layers=2))


def state(*scores: tuple[float, float], elements: tuple[int, ...] = ()) -> State:
    """Return a state with scores of NVFP4 and FP8 by layer."""
    layers = tuple(
        KVLayer(
            number=number,
            elements=elements[number] if elements else 64,
            k_amax=1.0,
            v_amax=1.0,
            scores=dict(zip(RECIPES, each, strict=True)),
        )
        for number, each in enumerate(scores)
    )
    found = KVSearch(bits={"nvfp4": 4.5, "fp8": 8.0}, layers=layers)
    return msgspec.structs.replace(TWO, kv_formats=RECIPES, kv=found)


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
@pytest.mark.parametrize("target", [4.5, 5.0, 6.25, 7.9, 8.0, 16.0])
def test_the_best_choice_within_the_bits(target: float, method: Any) -> None:
    """Every choice, counted out, over layers of different sizes."""
    given = state((3.0, 0.1), (9.0, 2.0), (1.0, 0.2), (4.0, 3.9), elements=(64, 128, 64, 32))
    given = msgspec.structs.replace(given, method=method)
    assert given.kv is not None
    layers, best = given.kv.layers, math.inf
    for names in itertools.product(RECIPES, repeat=len(layers)):
        bits = sum(given.kv.bits[name] * layer.elements for name, layer in zip(names, layers, strict=True))
        scores = [layer.scores[name] for name, layer in zip(names, layers, strict=True)]
        if bits <= target * sum(layer.elements for layer in layers):
            best = min(best, sum(scores) if method == "gradient" else max(scores))
    choice = choose_kv(given, target)
    assert choice is not None
    assert choice.bits <= target
    assert choice.score == pytest.approx(best)


@pytest.mark.parametrize(
    ("given", "target", "match"),
    [
        (state((1.0, 0.1)), 4.4, "--kv-bits: 4.4: expected at least 4.5, the bits of nvfp4"),
        (state((1.0, 0.1)), math.nan, "--kv-bits: nan: expected at least 4.5"),
        (state((1.0, 0.1)), math.inf, "--kv-bits: inf: expected at least 4.5"),
        (state((1.0, 0.1)), None, "--kv-bits: expected bits per cached element"),
        (TWO, 6.0, "--kv-bits: 6: expected a search over the KV cache"),
        (msgspec.structs.replace(state((1.0, 0.1)), kv=None), 6.0, "has not measured the KV cache"),
        (state((1.0, math.nan)), 6.0, "kv.layers.0: expected finite numbers"),
        (msgspec.structs.replace(state((1.0, 0.1)), kv=KVSearch(bits={"nvfp4": 1.0}, layers=())), 6.0, "kv.bits.nvfp4"),
    ],
)
def test_choices_that_cannot_be_made(given: State, target: float | None, match: str) -> None:
    with pytest.raises(ModelOptExtError, match=match):
        choose_kv(given, target)


def test_no_choice_without_candidates() -> None:
    assert choose_kv(TWO, None) is None


def test_gradient_scores_are_what_they_are_called(model: Path) -> None:
    """From outside of attention: the gradient of the output projection's input, and how that input changes."""
    loaded, _ = load_model(model, "cpu", progress=False)
    calibration, scored, _ = texts(model)
    batches = scored.batches()[:2]
    found = search_cache(loaded, model, RECIPES, "gradient", calibration.batches(), batches, "cpu", progress=False)
    projections = [layer.self_attn.o_proj for layer in loaded.model.layers]

    def inputs(ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        kept: list[torch.Tensor] = []
        hooks = [one.register_forward_pre_hook(lambda _, given: kept.append(given[0])) for one in projections]
        logits = loaded(input_ids=ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        return kept, loss

    expected = {(layer.number, name): 0.0 for layer in found.layers for name in RECIPES}
    loaded.requires_grad_(True)
    for ids in batches:
        with cache_rounded(loaded, {}):  # the same plain attention, whose additions have another order than torch's
            plain, loss = inputs(ids)
        gradients = torch.autograd.grad(loss, plain)
        for layer, name in itertools.product(found.layers, RECIPES):
            only = {layer.number: (Measured(layer.k_amax, layer.v_amax), KV_RECIPES[name])}
            with torch.no_grad(), cache_rounded(loaded, only):
                change = inputs(ids)[0][layer.number].float() - plain[layer.number].float()
            value = (gradients[layer.number].float().square() * change.square()).sum()
            expected[layer.number, name] += float(value)
    for layer in found.layers:
        # The gradients are in bf16, of a loss that is scaled in one and not in the other: rounded apart by 2^-8 each.
        assert layer.scores == pytest.approx({name: expected[layer.number, name] for name in RECIPES}, rel=0.02)
        assert layer.scores["nvfp4"] > 3 * layer.scores["fp8"] > 0, "eight bits lose less than four"
    assert loaded.config._attn_implementation != "sglang_modelopt_ext_reference", "the model's own attention is back"


def test_a_search_over_the_cache(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mix that is exported is what was chosen, with the scales that ModelOpt calibrates, and reads as it was measured."""
    output = tmp_path / "mixed"
    assert main(arguments(model, output, *CACHE)) == 0
    assert "KV cache:   6.2500 bits per element" in capsys.readouterr().out
    report = read_report(output / "autoquant.json")
    (result,) = report.results
    kv, choice = report.state.kv, result.choice.kv
    assert kv is not None
    assert choice is not None
    assert sorted(choice.formats.values()) == ["fp8", "nvfp4"]
    worse = max(kv.layers, key=lambda layer: layer.scores["nvfp4"] - layer.scores["fp8"])
    assert choice.formats[str(worse.number)] == "fp8"
    plan = read_plan(output, read_quant_config(output), "auto")
    assert plan is not None
    assert {str(number): plan.recipes.of(number).name for number in (0, 1)} == choice.formats
    record = read_record(output)
    assert record is not None
    assert record.kv_cache_recipe == "nvfp4"
    assert record.kv_cache_layers == {str(worse.number): "fp8"}
    alone = tmp_path / "alone"
    sizes = ["--samples", "12", "--sequence-length", "48"]
    data = calibration_file(model, tmp_path)
    argv = ["quantize", str(model), "--recipe", "none", "--kv", "nvfp4", "--data", str(data), "--output", str(alone)]
    assert main([*argv, *sizes, "--device", "cpu"]) == 0
    assert scales(output) == scales(alone)
    check_reading(model, alone, kv, choice)
    again = ["auto-quantize", "--from-state", str(output / "autoquant.json"), "--bits", "6.5", "--kv-bits"]
    assert main([*again, "4.5"]) == 0
    assert "--kv-bits: 4: expected at least 4.5" in failure(capsys, [*again, "4"])


def test_an_interrupted_search_keeps_what_it_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of a GPU differ in their last bits from run to run: measured again, they would make another state."""
    argv = arguments(model, tmp_path / "out", *CACHE, "--no-export")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(autoquant.Search, "run", interrupt)
        assert main(argv) == 130
    monkeypatch.setattr(autoquant, "search_cache", interrupt)
    assert main([*argv, "--resume"]) == 0
    report = read_report(tmp_path / "out/autoquant.json")
    assert report.state.kv is not None
    assert report.results[0].choice.kv is not None


def check_reading(model: Path, alone: Path, kv: KVSearch, choice: KVChoice) -> None:
    """Check the rounding of a search against the reading of an export that quantizes nothing but the cache, mixed by its record."""
    uniform = read_plan(alone, read_quant_config(alone), "auto")
    assert uniform is not None
    other = {int(number): KV_RECIPES[name] for number, name in choice.formats.items() if name != "nvfp4"}
    _, _, held_out = texts(model)
    ids = held_out.batches()[0]
    loaded, _ = load_model(model, "cpu", progress=False)
    with torch.no_grad(), chosen_cache(loaded, kv, choice):
        measured = loaded(input_ids=ids, use_cache=False).logits
    apart = []
    for plan in (dataclasses.replace(uniform, other=other), uniform):
        reading = ReferenceModel(alone, dtype=torch.bfloat16, kv_cache=plan).model
        with torch.no_grad():
            apart.append(float((reading(input_ids=ids, use_cache=False).logits != measured).float().mean()))
    assert apart[0] == 0.0, apart
    assert apart[1] > 0.5, apart


def calibration_file(model: Path, folder: Path) -> Path:
    """Return a file whose windows are those that the search calibrates on."""
    calibration, _, _ = texts(model)
    tokenizer = load_tokenizer(model)
    file = folder / "windows.jsonl"
    rows = [{"text": tokenizer.decode(window, skip_special_tokens=True)} for window in calibration.windows]
    file.write_bytes(b"\n".join(map(msgspec.json.encode, rows)) + b"\n")
    return file


def scales(folder: Path) -> dict[str, float]:
    headers = [header for name, header in read_headers(folder).items() if name.endswith(("k_scale", "v_scale"))]
    assert headers
    return {header.name: float(tensor) for header, tensor in read_tensors(headers)}


def test_scores_by_divergence(model: Path, tmp_path: Path) -> None:
    loaded, _ = load_model(model, "cpu", progress=False)
    calibration, scored, held_out = texts(model)
    windows = (calibration.batches(), scored.batches()[:2])
    found = search_cache(loaded, model, RECIPES, "kl_div", *windows, "cpu", progress=False)
    assert all(layer.scores["nvfp4"] > layer.scores["fp8"] >= 0 for layer in found.layers)
    before = perplexity(loaded, held_out.batches(), "cpu", label="before", progress=False)
    choice = choose_kv(msgspec.structs.replace(TWO, kv_formats=("nvfp4",), kv=found), None)
    with chosen_cache(loaded, found, choice):
        assert perplexity(loaded, held_out.batches(), "cpu", label="rounded", progress=False) != before
    assert perplexity(loaded, held_out.batches(), "cpu", label="after", progress=False) == before


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--kv-formats", "nvfp4_affine", "--kv-bits", "6"), "--kv-formats: nvfp4_affine: expected one of fp8, nvfp4"),
        (("--kv-formats", "fp8,fp8"), "--kv-formats: names: expected each of them once"),
        (("--kv-formats", "fp8,nvfp4"), "--kv-bits: expected bits per cached element, from 4.5 on"),
        (("--kv-bits", "6"), "--kv-bits: 6: expected a search over the KV cache (--kv-formats)"),
    ],
)
def test_options_that_are_wrong(
    more: tuple[str, ...], match: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert match in failure(capsys, arguments(model, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_latent_attention_has_no_such_cache(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latent = edits.copy_with(model, tmp_path / "latent", [edits.set_fields(edits.CONFIG, {"kv_lora_rank": 16})])
    assert "latent attention" in failure(capsys, arguments(latent, tmp_path / "out", *CACHE))
