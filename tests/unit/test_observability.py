"""What a server says of itself: whose weights and cache they are, and which kernels compute the layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang_modelopt_ext.checkpoint.quant_config import QuantConfig
from sglang_modelopt_ext.integration import observability
from sglang_modelopt_ext.integration.observability import INFO, LAYERS, STATE_KEY, Served, gauges, served_by
from sglang_modelopt_ext.integration.products import Product
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_kernels.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES

NVFP4 = LayerScheme("NVFP4", WEIGHT_FORMATS["nvfp4"], ACTIVATION_FORMATS["nvfp4_dynamic"], smoothing=True)
GATE_UP = Product(NVFP4, "exact", "triton_grouped", "gate and up", 8)
LINEAR = Product(NVFP4, "exact", "triton")
SERVED = Served("modelopt_ext", "modelopt_nvfp4", "NVFP4", {GATE_UP: 2, LINEAR: 8}, None, "sglang")


def runner(flag: str) -> Any:
    """Return as much of a ModelRunner as is read, with a model that SGLang serves."""
    args = SimpleNamespace(model_path="no/such/model", revision=None)
    return SimpleNamespace(model=torch.nn.Linear(1, 1), kv_cache_dtype_str=flag, server_args=args)


@pytest.mark.parametrize(
    ("flag", "recipe", "pool"),
    [
        ("auto", None, "sglang"),
        ("bf16", None, "sglang"),
        ("fp8_e4m3", "fp8", "sglang"),
        ("nvfp4", "nvfp4", "sglang"),
        ("modelopt_nvfp4_rotate", "nvfp4_rotate", "modelopt_ext"),
    ],
)
def test_whose_cache_it_is(flag: str, recipe: str | None, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observability, "wrapped_plan", lambda args: None)
    found = served_by(runner(flag))
    assert (found.weights, found.quantization, found.algo, found.products) == ("sglang", None, None, {})
    assert (found.kv_recipe, found.kv_pool) == (recipe, pool)


def test_a_recipe_around_sglangs_cache_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SimpleNamespace(recipe=KV_RECIPES["fp8_affine"])
    monkeypatch.setattr(observability, "wrapped_plan", lambda args: plan)
    found = served_by(runner("fp8_e4m3"))
    assert (found.kv_recipe, found.kv_pool) == ("fp8_affine", "sglang")


def test_the_state_has_every_product() -> None:
    layers = SERVED.as_state()["layers"]
    assert [(entry["kind"], entry["kernel"], entry["count"]) for entry in layers] == [
        ("experts, gate and up", "triton_grouped", 2),
        ("linear", "triton", 8),
    ]
    assert layers[0]["smoothing"] is True


def test_gauges_have_labels_of_strings_and_the_same_ones_for_every_product() -> None:
    (info, labels, one), *layers = gauges(SERVED)
    assert (info, one) == (INFO, 1)
    assert labels["kv_recipe"] == ""
    assert [(name, value) for name, _, value in layers] == [(LAYERS, 2), (LAYERS, 8)]
    assert layers[0][1].keys() == layers[1][1].keys()
    assert all(isinstance(text, str) for _, named, _ in gauges(SERVED) for text in named.values())
    assert layers[0][1]["smoothing"] == "true"


def test_the_answer_of_a_scheduler_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observability, "wrapped_plan", lambda args: None)
    scheduler = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner("auto")), metrics_collector=None)
    answer = SimpleNamespace(internal_state={"world_size": 1})
    observability._emit_metrics_constants(lambda self: None, scheduler)
    # Nothing is read any more: an error here would end the server, after its folder was moved away for instance.
    monkeypatch.setattr(observability, "served_by", lambda runner: pytest.fail("read again"))
    got = observability._get_internal_state(lambda *args: answer, SimpleNamespace(scheduler=scheduler), None)
    assert got is answer
    assert got.internal_state["world_size"] == 1
    assert got.internal_state[STATE_KEY]["weights"] == "sglang"


def test_gauges_are_set_again_and_without_metrics_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    monkeypatch.setattr(observability, "served_by", lambda runner: SERVED)
    scheduler = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=None), metrics_collector=None)
    done: list[Any] = []
    observability._emit_metrics_constants(done.append, scheduler)
    assert prometheus.REGISTRY.get_sample_value(INFO) is None
    scheduler.metrics_collector = SimpleNamespace(labels={"tp_rank": 3})
    for _ in range(2):
        observability._emit_metrics_constants(done.append, scheduler)
    assert done == [scheduler] * 3
    found = [
        sample
        for metric in prometheus.REGISTRY.collect()
        for sample in metric.samples
        if sample.name == LAYERS and sample.labels["kernel"] == "triton"
    ]
    assert [(sample.value, sample.labels["tp_rank"]) for sample in found] == [(8, "3")]


@pytest.mark.parametrize("worker", [SimpleNamespace(), SimpleNamespace(model_runner=SimpleNamespace())])
def test_a_model_that_cannot_be_described_is_served(worker: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An error in a scheduler ends it, and what serves the model is information only."""
    scheduler = SimpleNamespace(tp_worker=worker, metrics_collector=None)
    done: list[Any] = []
    observability._emit_metrics_constants(done.append, scheduler)
    assert done == [scheduler]
    assert "do not say what serves the model" in caplog.text
    answer = SimpleNamespace(internal_state={"world_size": 1})
    got = observability._get_internal_state(lambda *args: answer, SimpleNamespace(scheduler=scheduler), None)
    assert got.internal_state == {"world_size": 1}


def test_a_config_of_ours_names_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(family="modelopt_w4a8", config=QuantConfig(file=__file__, algo="W4A8_NVFP4_FP8"))  # type: ignore[arg-type]
    monkeypatch.setattr(observability, "wrapped_plan", lambda args: None)
    monkeypatch.setattr(observability, "ext_config", lambda model: config)
    found = served_by(runner("auto"))
    assert (found.weights, found.quantization, found.algo) == ("modelopt_ext", "modelopt_w4a8", "W4A8_NVFP4_FP8")
