"""The kernel for a layer's experts: for every algorithm on every architecture, with the reasons of those rejected."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_modelopt_ext.backends import self_test
from sglang_modelopt_ext.backends.base import ShardWeight
from sglang_modelopt_ext.backends.experts.base import ExpertRequest, Routing
from sglang_modelopt_ext.backends.experts.grouped import (
    GroupedBf16,
    GroupedDecoded,
    GroupedExperts,
    GroupedMxfp4,
    GroupedStreamed,
)
from sglang_modelopt_ext.backends.select import EXPERT_BACKENDS, expert_candidates, served_scheme
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.moe.grouped import GroupedWeight
from sglang_modelopt_kernels.moe.route import Routed

GROUPED, TCGEN05, BF16, STREAMED = (
    backend.name for backend in (GroupedDecoded, GroupedMxfp4, GroupedBf16, GroupedStreamed)
)
ROWS = [(scheme.algo, weight) for scheme in SCHEMES.values() for weight in scheme.weights if not scheme.low_rank]


def request(algo: str, capability: int | None = 90, weight: str | None = None, **fields: object) -> ExpertRequest:
    scheme = SCHEMES[algo]
    layer = LayerScheme(algo, WEIGHT_FORMATS[weight or scheme.weights[0]], scheme.activation_format())
    device = Device.cpu() if capability is None else Device.cuda(capability)
    arguments = {"n": 1536, "k": 2048, "experts": 128, "top_k": 8} | fields
    return ExpertRequest(served_scheme(layer, device), device, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 103, 120])
@pytest.mark.parametrize(("algo", "weight"), ROWS)
def test_on_a_gpu(algo: str, weight: str, capability: int) -> None:
    special = {90: STREAMED} if algo in ("W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8") else {}
    special |= dict.fromkeys((100, 103), TCGEN05) if algo == "W4A8_MXFP4_FP8" else {}
    asked = request(algo, capability, weight)
    assert expert_candidates(asked, "experts")[0].name == special.get(capability, GROUPED)


def test_parts_of_tiles_and_other_tritons_are_not_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = GroupedStreamed()
    for fields in ({"n": 1536 + 32}, {"k": 2048 + 128}):
        asked = request("W4A8_MXFP4_FP8", **fields)  # type: ignore[arg-type]
        assert "needs N in 64s and K in 256s" in str(streamed.supports(asked))
        assert expert_candidates(asked, "experts")[0].name == GROUPED
    assert "FP8 activations" in str(streamed.supports(request("MXFP4")))
    assert "math fp8" in str(streamed.supports(dataclasses.replace(request("W4A8_NVFP4_FP8"), math="fp8")))
    monkeypatch.setattr("sglang_modelopt_ext.backends.experts.grouped.missing", lambda: "needs another Triton")
    assert streamed.supports(request("W4A8_MXFP4_FP8")) == "needs another Triton"


@pytest.mark.parametrize(
    ("backend", "tokens", "sorts"),
    [(GroupedStreamed(), 1, False), (GroupedStreamed(), 2, True), (GroupedDecoded(), 1, True)],
)
def test_one_token_is_not_sorted_for_the_product_that_needs_no_order(
    backend: GroupedExperts, tokens: int, sorts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pass has once is known the second time."""
    table = Routed(*(torch.zeros(0, dtype=torch.int32) for _ in range(3)), 8)
    monkeypatch.setattr("sglang_modelopt_ext.backends.experts.grouped.route", lambda *arguments: table)
    codes, scale = torch.zeros(9, 64, 128, dtype=torch.uint8), torch.zeros(9, 64, 8, dtype=torch.uint8)
    weight = GroupedWeight(codes, scale, torch.ones(9, 64), "mxfp4_tiles", True)
    routing = Routing(torch.arange(4 * tokens, dtype=torch.int32), 4)
    for known in (False, True):
        routed, before = backend._sorted(weight, torch.float8_e4m3fn, routing)
        assert before == known
        assert (routed is table) == sorts
        assert routed.single != sorts
        assert sorts or routed.owner is routing.experts


@pytest.mark.parametrize("capability", [None, 80, 89, 90, 100, 103, 120])
def test_calibrated_mxfp4_has_the_kernels_of_the_preset(capability: int | None) -> None:
    """All of them take static FP8 activations as they take those scaled by token."""
    asked = request("W4A8_MXFP4_FP8", capability)
    by_token = [backend.name for backend in expert_candidates(asked, "experts")]
    static = SCHEMES["W4A8_MXFP4_FP8"].activation_format(["input_scale"])
    asked = dataclasses.replace(asked, scheme=dataclasses.replace(asked.scheme, activation=static))
    assert asked.scheme.describe() == "W4A8_MXFP4_FP8 (weights mxfp4, activations fp8_static)"
    assert [backend.name for backend in expert_candidates(asked, "experts")] == by_token


@pytest.mark.parametrize(("algo", "weight"), ROWS)
def test_on_a_cpu(algo: str, weight: str) -> None:
    assert [backend.name for backend in expert_candidates(request(algo, None, weight), "experts")] == [
        "experts_reference"
    ]


@pytest.mark.parametrize(
    ("algo", "fields", "operand"),
    [
        ("W4A8_NVFP4_FP8", {"capability": 89}, torch.float8_e4m3fn),
        ("W4A8_NVFP4_FP8", {"capability": 80}, torch.float16),
        ("W4A8_NVFP4_FP8", {"math": "fp8"}, torch.float8_e4m3fn),
        ("FP8", {"capability": 80}, torch.float16),
        ("FP8", {"dtype": torch.float32}, torch.float16),  # FP8 matrix instructions may sum at less
        ("NVFP4", {"capability": 100}, torch.float16),
        ("MXFP4", {"capability": 100}, torch.bfloat16),
        ("NVFP4", {"dtype": torch.float16}, torch.float16),  # keeps its activations on SM90
        ("MXFP8", {}, torch.bfloat16),
        ("W8A8_SQ_PER_CHANNEL", {}, torch.float16),
        ("FP8_PB_WO", {}, torch.bfloat16),
    ],
)
def test_operands_hold_the_activations(algo: str, fields: dict[str, object], operand: torch.dtype) -> None:
    asked = request(algo, **fields)  # type: ignore[arg-type]
    backend = expert_candidates(asked, "experts")[0]
    assert backend.name == GROUPED
    assert backend.operand(asked) == operand


def test_what_does_not_fit_falls_back_or_is_refused() -> None:
    assert expert_candidates(request("W4A8_NVFP4_FP8", k=2056), "experts")[0].name == BF16
    for asked, reason in (
        (
            request("W4A16_NVFP4", dtype=torch.float32),
            r"triton_grouped does not take unrounded activations in torch.float32",
        ),
        (request("W4A16_AWQ", k=2056), r"triton_grouped needs K in 16s, not 2056"),
        (request("W4A16_AWQ", k=2056), r"triton_grouped_bf16 int4_awq weights are not exact in bf16"),
        (request("FP8", 75), r"triton_grouped is for GPUs from SM80"),
    ):
        with pytest.raises(ModelOptExtError, match=reason) as caught:
            expert_candidates(asked, "experts")
        assert all(backend.name in str(caught.value) for backend in EXPERT_BACKENDS)


def test_a_backend_may_refuse_by_values() -> None:
    """MXFP4 whose exponents do not fit the packed form goes to the next backend, which keeps the same weight."""
    number = WEIGHT_FORMATS["mxfp4"]
    stored = {"weight": torch.full((4, 32), 0x21, dtype=torch.uint8)}
    stored["weight_scale"] = torch.tensor([[127, 90]], dtype=torch.uint8).repeat(4, 1)
    experts = [[ShardWeight(number, stored), ShardWeight(number, stored)]] * 2
    with pytest.raises(ValueError, match="span"):
        GroupedDecoded().prepare(experts)
    prepared = GroupedBf16().prepare(experts)
    assert prepared.codes.shape == (2, 8, 64)
    assert torch.equal(prepared.codes[1, 4:].float(), number.decode(stored).unit)


def interpreted(tokens: tuple[int, ...]) -> list[list[str]]:
    """Run every scheme through a backend's check on the device at hand, in Triton's interpreter, and return the failures."""
    self_test.N, self_test.K = 72, 256
    failed = []
    for algo, weight in ROWS:
        for capability in (90, 100):
            asked = request(algo, capability, weight, dtype=torch.float32 if algo == "FP8" else torch.bfloat16)
            for backend in expert_candidates(asked, "experts"):
                if not backend.interpreted:
                    continue
                if tokens:
                    backend.check_tokens = lambda *layer: tokens  # type: ignore[method-assign]
                try:
                    self_test.check_expert_backend(backend, asked, torch.device("cpu"))
                except ValueError as error:
                    failed.append([algo, backend.name, str(error)])
    # One sorting serves both products of a layer.
    backend, number = GroupedDecoded(), WEIGHT_FORMATS["fp8"]
    prepared = backend.prepare([[ShardWeight(number, number.quantize(torch.randn(32, 32)))]] * 3)
    routing = Routing(torch.tensor([0, 2, -1, 1], dtype=torch.int32), 2)
    for rows in (2, 4):
        backend.matmul(prepared, torch.zeros(rows, 32, dtype=torch.float16), None, routing, torch.float32)
    if len(routing.derived) != 1:
        failed.append(["routing", str(len(routing.derived)), "sortings"])
    return failed


@pytest.mark.parametrize("tokens", [(1, 40), pytest.param((), marks=pytest.mark.full, id="all")])
def test_every_scheme_in_the_interpreter(tokens: tuple[int, ...]) -> None:
    """One process: Triton decides at import whether it interprets. Products of many tokens take minutes there."""
    script = (
        "import json, sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('cases', {str(Path(__file__))!r}); cases = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(cases)\n"
        f"print(json.dumps(cases.interpreted({tokens})))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
