"""The state file: targets solved from it, and files that are rejected."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant import plots
from sglang_modelopt_ext.workflow.autoquant.plots import CHOICES, TRADE_OFF, draw
from sglang_modelopt_ext.workflow.autoquant.state import (
    Candidate,
    Choice,
    Format,
    Group,
    Layer,
    Measured,
    Report,
    Result,
    State,
    Target,
    choose,
    read_report,
    write_json,
)
from sglang_modelopt_ext.workflow.quantize.record import Calibration
from tests.support import fuzz

TEXT = Calibration(data=("a.txt",), sha256="0", samples=1, tokens=100, sequence_length=100, batch_size=1, seed=0)
FORMATS = {"W4A8_NVFP4_FP8_CFG": 4.25, "FP8_DEFAULT_CFG": 8.0}


def group(name: str, score: float | None, *, excluded: bool = False) -> Group:
    """Return a group of one layer of 1000 weights; FP8 hurts a tenth of what 4 bits hurt."""
    candidates = {} if excluded else {"W4A8_NVFP4_FP8_CFG": Candidate(cost=4250, score=score)}
    if not excluded:
        candidates["FP8_DEFAULT_CFG"] = Candidate(cost=8000, score=None if score is None else score / 10)
    candidates["none"] = Candidate(cost=16000, score=0.0)
    return Group(name=name, layers=(Layer(name=name, n=10, k=100),), excluded=excluded, candidates=candidates)


def state(*groups: Group, **changes: Any) -> State:
    """Return a state over these groups."""
    formats = tuple(
        Format(
            name=name,
            algo=name.removesuffix("_CFG"),
            group_size=0,
            bits=bits,
            algorithm="max",
            served_by=("dense_float32",),
            served_as=name,
        )
        for name, bits in FORMATS.items()
    )
    fields: dict[str, Any] = {
        "model": "models/tiny",
        "model_sha256": "0",
        "method": "gradient",
        "loss_scale": 1.0,
        "calibration": TEXT,
        "scored": TEXT,
        "gpu": "sm90",
        "lm_head": "excluded",
        "excluded": (),
        "unquantized_bits": 16,
        "simulation": "cpu",
        "versions": {},
        "formats": formats,
        "groups": groups,
    }
    return State(**{**fields, **changes})


def report(chosen: State, *targets: float, perplexity: float | None = None) -> Report:
    """Return a report with those targets."""
    measured = Measured(folder=None, algo=None, stored_bits=None, quantized_bits=None, perplexity=perplexity)
    results = tuple(Result(choice=choose(chosen, Target(target)), measured=measured) for target in targets)
    return Report(state=chosen, results=results, held_out=TEXT, unquantized_perplexity=perplexity)


TWO = state(group("model.layers.0.mlp.down_proj", 1.0), group("model.layers.1.mlp.down_proj", 5.0))


def test_the_sensitive_layer_gets_more_bits() -> None:
    choice = choose(TWO, Target(6.5))
    assert list(choice.formats.values()) == ["W4A8_NVFP4_FP8_CFG", "FP8_DEFAULT_CFG"]
    assert choice.bits == pytest.approx((4.25 + 8) / 2)
    assert choice.score == pytest.approx(1.5)


def test_a_target_out_of_reach_says_what_is_reached() -> None:
    with pytest.raises(
        ModelOptExtError, match=r"--bits: 4.2: expected at least 4.25, the fewest the formats reach, got"
    ):
        choose(TWO, Target(4.2))
    left = state(*TWO.groups, group("lm_head", None, excluded=True))
    with pytest.raises(ModelOptExtError, match=r"at least 8.1667, .* with 1 unquantized layers counted \(lm_head\)"):
        choose(left, Target(8.0))
    assert choose(left, Target(8.1667)).bits == pytest.approx((4.25 * 2 + 16) / 3)


def test_a_target_that_quantizes_nothing() -> None:
    with pytest.raises(ModelOptExtError, match="less than 16, the bits of an unquantized weight"):
        choose(TWO, Target(16.0))


def test_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "autoquant.json"
    write_json(file, report(TWO, 6.5))
    assert read_report(file) == report(TWO, 6.5)
    assert [path.name for path in tmp_path.iterdir()] == ["autoquant.json"]


class Trap:
    """An object that records whether it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return pytest.fail, ("a pickle was read",)


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    plain, saved = tmp_path / "state.json", tmp_path / "autoquant.json"
    plain.write_bytes(pickle.dumps(Trap()))
    torch.save({"candidate_stats": {}}, saved)
    for file, kind in ((plain, "a pickle"), (saved, r"a torch checkpoint \(pickle\)")):
        with pytest.raises(
            ModelOptExtError, match=rf"{file.name}: --from-state: expected .*, got {kind}, which is never"
        ):
            read_report(file)


def edited(change: Callable[[dict[str, Any]], None]) -> bytes:
    content = json.loads(msgspec.json.encode(report(TWO, 6.5)))
    change(content)
    return json.dumps(content).encode()


def first(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["state"]["groups"][0]["candidates"]["FP8_DEFAULT_CFG"]
    return found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the autoquant.json of an earlier run"),
        (b'{"quantization": {"quant_algo": "FP8"}}', "unknown field `quantization`"),
        (b"[1, 2]", "Expected `object`, got `array`"),
        (edited(lambda c: c.update(schema="sglang-modelopt-ext/autoquant/9")), r"Invalid enum value .* `\$.schema`"),
        (edited(lambda c: c["state"].update(extra=1)), "unknown field `extra`"),
        (edited(lambda c: c["state"].update(groups=[])), "layers that count, got none"),
        (edited(lambda c: first(c).update(score=None)), "FP8_DEFAULT_CFG: score: expected a finite number"),
        (edited(lambda c: first(c).update(score=-1.0)), "a finite number, not negative, got -1.0"),
        (edited(lambda c: first(c).update(cost=0)), "a positive number of bits, got 0"),
        (edited(lambda c: c["state"]["formats"].pop()), "candidates among none, W4A8_NVFP4_FP8_CFG, got"),
        (edited(lambda c: c["state"]["groups"].append(c["state"]["groups"][0])), "names that differ, got one twice"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "some.json"
    file.write_bytes(content)
    with pytest.raises(ModelOptExtError, match=message) as caught:
        read_report(file)
    assert str(file) in str(caught.value)


def test_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels one below the other, like for a large model, with an unquantized group and a score of zero."""
    kinds = ("self_attn.o_proj", "mlp.down_proj")
    groups = [group(f"model.layers.{i}.{kind}", 10.0 ** (i / 8 - 4)) for i in range(8) for kind in kinds]
    groups += [group("model.layers.8.mlp.down_proj", 0.0), group("lm_head", None, excluded=True)]
    large = state(*groups)
    assert [path.name for path in draw(tmp_path, report(TWO, 6.5))] == [CHOICES]
    monkeypatch.setattr(plots, "_COLUMNS", 12)
    drawn = draw(tmp_path, report(large, 5.0, 6.0, 8.0, perplexity=10.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((CHOICES, TRADE_OFF))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


@pytest.mark.parametrize("part", [Report, State, Format, Group, Layer, Candidate, Choice, Measured, Result])
def test_every_field_is_documented(part: type[msgspec.Struct]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "auto-quantize.md").read_text(encoding="utf-8")
    assert not [field for field in part.__struct_fields__ if f"`{field}`" not in page]


def test_damaged_files_end_in_one_line(tmp_path: Path) -> None:
    """Those that are read nevertheless can be solved, or say why not."""
    whole = tmp_path / "whole.json"
    write_json(whole, report(state(group("a", 1.0), group("b", 2.0, excluded=True), group("c", 0.5)), 10.0))
    read = 0
    for seed in range(400):
        file = tmp_path / "damaged.json"
        file.write_bytes(whole.read_bytes())
        fuzz.damage_json(file, random.Random(seed))
        try:
            choose(read_report(file).state, Target(10.0))
            read += 1
        except ModelOptExtError:
            continue
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    assert 10 < read < 390
