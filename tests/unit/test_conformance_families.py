"""The conformance run's families and features without an engine: their readings, and what a judge makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conformance import families, features
from tests.conformance.cases import CASES, FAMILY_CASES, Case, chosen, exports_of
from tests.conformance.drive import ADAPTER, Drive, Scored
from tests.conformance.exports import EXPORTS
from tests.conformance.judge import Judge
from tests.conformance.reading import Reader, Reading
from tests.conformance.run import LONGEST_TAIL, tail
from tests.support import edits
from tests.support.adapters import add_adapter, make_adapter
from tests.support.models import random_ids
from tests.support.reference import Reference

pytest.importorskip("modelopt", reason="needs nvidia-modelopt to make exports")

GPU = 90
IDS = random_ids(48, seed=9, vocab=511)
FAST = ("gpt-oss", "nemotron-h", "llama4")
"""Families whose experts are packed, without a gate, and given all tokens."""
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.full) for name in families.ARCHITECTURES]
ONE_SCALE = {
    "nvfp4": "*down_proj_weight_scale",
    "fp8": "*down_proj_weight_scale",
    "w4a8-nvfp4": "*.down_proj.weight_scale_2",
}
"""By recipe, the scales that are wrong in a wrong export."""
RENAMED = {"minimax-m2": "*.w2.weight_scale_2"}
"""Those of a family that stores its experts under names of its own."""
NORMED = {"gemma3": "*.weight_scale"}
"""Those of a family with a norm behind each block, which takes the scale of its last layer out again: its blocks' scales."""


def named(name: str) -> Case:
    return next(one for one in CASES if one.name == name)


@pytest.mark.parametrize("name", NAMES)
def test_an_unquantized_twin_is_read_as_transformers_loads_it(name: str) -> None:
    """The names that a checkpoint stores, its experts stacked or packed, end where transformers itself puts them."""
    import transformers

    folder = EXPORTS[f"bf16-{name}"].make()
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([IDS]), use_cache=False).logits[0], dim=-1)
    torch.testing.assert_close(Reference(folder).logprobs(IDS), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_scale_of_a_family_is_found(name: str, tmp_path: Path) -> None:
    """A sound engine, which is the bf16 reading here, is right; one with scales that are twice as large, or of others, is not."""
    recipe = next(iter(families.ARCHITECTURES[name].recipes))
    one = named(f"{recipe}-{name}")
    reads, reading = one.of.make(), Reading.of(one, GPU)
    change = edits.map_tensors(RENAMED.get(name, ONE_SCALE[recipe]), _doubled)
    if name in NORMED:
        change = edits.map_tensors(NORMED[name], _of_others)
    wrong = edits.copy_with(reads, tmp_path / "wrong", [change])

    def scored(reader: Reader) -> list[Scored]:
        sent = [random_ids(length, seed=length, vocab=511) for length in (17, 33, 65)]
        return [Scored("some", ids, 1, reader.scores(ids).tolist(), len(ids)) for ids in sent]

    with torch.inference_mode():
        judge = Judge(reads, one, reading, "cpu")
        assert judge.judge(scored(judge.rough)).verdict == "right"
        assert judge.judge(scored(Reader(wrong, reading, torch.bfloat16))).verdict == "wrong"


def _of_others(scale: torch.Tensor) -> torch.Tensor:
    return scale.view(torch.uint8).roll(1, dims=1).view(scale.dtype)


def _doubled(scale: torch.Tensor) -> torch.Tensor:
    return (scale.to(torch.float32) * 2).to(scale.dtype)


def test_a_family_has_a_twin_and_its_recipes() -> None:
    for name, of in families.ARCHITECTURES.items():
        cases = {one.name: one for one in FAMILY_CASES if one.of.family == name}
        assert not cases[f"bf16-{name}"].plugin
        for recipe in of.recipes:
            assert cases[f"{recipe}-{name}"].plugin
            assert cases[f"{recipe}-{name}"].expect == "right"
            assert (f"{recipe}-{name}-alone" in cases) == (recipe in of.ours)


def test_an_absorbed_layer_is_read_with_unrounded_inputs() -> None:
    """SGLang multiplies its weight into others: of all layers it alone rounds nothing."""
    one = named("w4a8-nvfp4-deepseek-v3")
    reader = Reader(one.of.make(), Reading.of(one, GPU), torch.float32)
    x = torch.linspace(-3, 3, 512).repeat(2, 1)
    modules = dict(reader.reference.model.named_modules())
    layer = modules["model.layers.0.self_attn.kv_b_proj"]
    torch.testing.assert_close(layer(x), x @ layer.weight_parts.dequantized().T, atol=1e-4, rtol=1e-4)
    other = modules["model.layers.0.self_attn.q_a_proj"]
    assert not torch.allclose(other(x), x @ other.weight_parts.dequantized().T, atol=1e-4, rtol=1e-4)


def test_an_adapter_is_in_requests_and_readings(tmp_path: Path) -> None:
    one = named("lora-w4a8-nvfp4")
    reading = Reading.of(one, GPU)
    folder = make_adapter(tmp_path / "adapter", Reference(one.of.make()).weights, torch.bfloat16)
    reference = Reference(one.of.make(), activation=reading.activation)
    add_adapter(reference, folder)
    with torch.inference_mode():
        read = Reader(one.of.make(), reading, torch.float32, adapter=folder).scores(IDS)
        plain = Reader(one.of.make(), reading, torch.float32).scores(IDS)
    torch.testing.assert_close(read, reference.input_logprobs(IDS), atol=1e-4, rtol=0)
    assert float((read - plain).abs().median()) > 0.1, "the adapter changes too little to be seen"
    asked: list[dict[str, Any]] = []

    def generate(**request: Any) -> list[dict[str, Any]]:
        asked.append(request)
        return [{}, {}]

    Drive(SimpleNamespace(generate=generate), one)._generate([IDS, IDS], 1)
    assert asked[0]["lora_path"] == [ADAPTER, ADAPTER]


def test_a_classifier_is_judged_by_the_scores_of_its_classes() -> None:
    pytest.importorskip("sglang")
    one = named("w4a8-nvfp4-classifier")
    reading = Reading.of(one, GPU)
    reader = Reader(one.of.make(), reading, torch.bfloat16)

    class Manager:
        async def generate_request(self, request: Any, _: None) -> Any:
            yield [{"embedding": reader.scores(ids).tolist()} for ids in request.input_ids]

    import asyncio

    loop = asyncio.new_event_loop()
    drive = Drive(SimpleNamespace(tokenizer_manager=Manager(), loop=loop, flush_cache=lambda: None), one)
    with torch.inference_mode():
        scored = drive.all()
        found = Judge(one.of.make(), one, reading, "cpu").judge(scored)
    loop.close()
    assert drive.repeats == 1.0
    assert found.verdict == "right"
    assert list(found.groups) == ["classes"]
    for answer in scored:
        answer.values.reverse()
    with torch.inference_mode():
        assert Judge(one.of.make(), one, reading, "cpu").judge(scored).verdict == "wrong"


def test_the_block_of_a_draft_is_not_in_the_reading() -> None:
    """The answers do not depend on who drafts: the case is read as the export without the block."""
    one = named("mtp-w4a8-nvfp4-deepseek-v3")
    assert one.reads == "w4a8-nvfp4-deepseek-v3"
    block = {name for name in edits.read_tensors(one.of.make()) if name.startswith("model.layers.2.")}
    rest = edits.read_tensors(one.of.make()).keys() - block
    assert rest == edits.read_tensors(EXPORTS[one.reads].make()).keys()
    assert "model.layers.2.eh_proj.weight" in block


def test_a_preset_with_a_head_quantizes_it() -> None:
    weights = Reference(EXPORTS["w4a8-nvfp4-lm-head"].make()).weights
    assert "lm_head" in weights
    assert "lm_head" not in Reference(EXPORTS["w4a8-nvfp4-llama"].make()).weights
    assert features.with_head("W4A8_NVFP4_FP8_CFG")["quant_cfg"]


def test_cases_that_results_lack(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    names = [one.name for one in CASES]
    rows = [{"case": name} for name in names if name not in ("fp8-alone", "draft-eagle3-w4a8-nvfp4")]
    results.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    found = chosen(1, None, results)
    assert {one.name for one in found} == {"fp8", "fp8-alone", "draft-eagle3-w4a8-nvfp4"}, "with the one it must equal"
    assert set(exports_of(found)) == {"fp8", "w4a8-nvfp4-llama", "draft-eagle3"}


def test_the_end_of_a_log_is_its_last_traceback() -> None:
    log = "start\nTraceback (most recent call last):\n  File x\nValueError: bad\nafter\n"
    assert tail(log).endswith("Traceback (most recent call last): | File x | ValueError: bad | after")
    assert tail("a\nb\n", lines=1) == "b"
    assert len(tail("x" * 9000)) == LONGEST_TAIL
    assert tail("") == ""
