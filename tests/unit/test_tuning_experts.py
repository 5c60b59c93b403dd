"""Tuning the experts of a mixture: from a real export to the choice, on a CPU with times that are told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_modelopt_ext.backends import select, self_test, timings
from sglang_modelopt_ext.backends.experts.base import ReferenceExperts
from sglang_modelopt_ext.backends.timings import key_of
from sglang_modelopt_ext.checkpoint.reader import Checkpoint, read_checkpoint
from sglang_modelopt_ext.env import EXPERTS, TUNING
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.tuning import run as tuning
from sglang_modelopt_ext.tuning.experts import experts_of
from tests.support.edits import copy_with, set_fields
from tests.support.exports import export
from tests.support.models import MOE_FAMILIES, TinyModel, model_dir

TOKENS = (1, 5)


class Renamed(ReferenceExperts):
    def __init__(self, name: str, factor: float = 1.0) -> None:
        self.name = name
        self.factor = factor

    def matmul(self, *arguments: Any) -> torch.Tensor:
        y = super().matmul(*arguments)
        # The check at load has few outputs: it passes there.
        return y if y.shape[1] == self_test.N else y * self.factor


FIRST, SECOND, WRONG = Renamed("first"), Renamed("second"), Renamed("wrong", 1.1)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(select, "EXPERT_BACKENDS", (FIRST, SECOND))
    timings._table.cache_clear()
    self_test._passed.clear()
    yield
    timings._table.cache_clear()
    self_test._passed.clear()


@pytest.fixture(scope="module", params=MOE_FAMILIES)
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return read_checkpoint(export(model_dir(TinyModel(request.param)), "W4A8_NVFP4_FP8_CFG"))


def timer_of(*times: float) -> Callable[[Callable[[int], object]], float]:
    said: list[float] = []

    def timer(call: Callable[[int], object]) -> float:
        assert isinstance(call(len(said)), torch.Tensor)
        said.append(times[len(said) % len(times)])
        return said[-1]

    return timer


def measured(
    checkpoint: Checkpoint, *times: float, backends: tuple[Renamed, ...] = (FIRST, SECOND)
) -> timings.TuningFile:
    return tuning.tune(
        checkpoint.folder,
        tokens=TOKENS,
        device="cpu",
        timer=timer_of(*times),
        backends=(),
        expert_backends=backends,
        report=lambda _: None,
    )


def test_kinds(checkpoint: Checkpoint) -> None:
    """Gate and up together, down, alike ones once; no expert among the linear layers."""
    config = json.loads((checkpoint.folder / "config.json").read_text())
    hidden, inner = config["hidden_size"], config.get("moe_intermediate_size") or config["intermediate_size"]
    experts = config.get("num_experts") or config["num_local_experts"]
    layers = config["num_hidden_layers"]
    found = [(kind.n, kind.k, kind.shards, kind.experts, kind.top_k, kind.count) for kind in experts_of(checkpoint)]
    top_k = config["num_experts_per_tok"]
    assert found == [(2 * inner, hidden, 2, experts, top_k, layers), (hidden, inner, 1, experts, top_k, layers)]
    assert [(kind.n, kind.k) for kind in experts_of(checkpoint, 2)] == [(inner, hidden), (hidden, inner // 2)]
    assert not any(".experts." in kind.name for kind in tuning.layers_of(checkpoint))
    with pytest.raises(ModelOptExtError, match=r"--tp-size: expected a divisor of the \d+ inner features"):
        experts_of(checkpoint, 7)


def test_from_a_file_to_the_choice(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = measured(checkpoint, 30.0, 30.0, 10.0, 20.0)
    results = [result for result in content.results if result.layer.experts]
    assert [result.us for result in results] == [{"first": [30.0, 30.0], "second": [10.0, 20.0]}] * 2
    path = tmp_path / "file.json"
    timings.write(path, content)
    assert timings.read(path) == content
    kinds = experts_of(checkpoint)
    requests = [kind.request(torch.device("cpu"), tuning.model_dtype(checkpoint)) for kind in kinds]
    assert [key_of(request) for request in requests] == [result.layer for result in results]

    def choices() -> list[str]:
        return [select.expert_candidates(request, "experts")[0].name for request in requests]

    assert choices() == ["first", "first"]
    monkeypatch.setenv(TUNING.variable, str(path))
    assert choices() == ["second", "second"]
    other = dataclasses.replace(requests[0], experts=requests[0].experts + 1)
    assert select.expert_candidates(other, "experts")[0].name == "first", "another number of experts is not known"
    monkeypatch.setenv(EXPERTS.variable, "first,second")
    assert choices() == ["first", "first"], "what the user names is not reordered"


def test_a_backend_that_errs_is_not_timed(checkpoint: Checkpoint) -> None:
    content = measured(checkpoint, 1.0, backends=(WRONG, FIRST))
    for result in content.results:
        if result.layer.experts:
            assert list(result.us) == ["first"]
            assert "is wrong: relative error 0.1 with 1 tokens" in result.refused["wrong"]


def test_a_configuration_without_choices(checkpoint: Checkpoint, tmp_path: Path) -> None:
    edit = set_fields("config.json", {"num_experts_per_tok": None})
    folder = copy_with(checkpoint.folder, tmp_path / "copy", [edit])
    with pytest.raises(ModelOptExtError, match=r"num_experts_per_tok: expected a number from 1 to"):
        experts_of(dataclasses.replace(checkpoint, folder=folder))
