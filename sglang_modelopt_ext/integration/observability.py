"""The kernels, recipe and cache that serve a model, for operators: in ``/server_info``, and as gauges of ``/metrics``.

Both are made of the model and the cache of a scheduler as they are when it starts, not of what was asked for. They do not change
afterwards: an update of the weights keeps the recipe. Nothing is read when a server is asked: an error in a scheduler ends it.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sglang_modelopt_ext import __version__
from sglang_modelopt_ext.checkpoint.kv_cache import KV_FLAGS, STOCK_FLAGS
from sglang_modelopt_ext.integration.hooks import Hook
from sglang_modelopt_ext.integration.kv.scales import plan_for, wrapped_plan
from sglang_modelopt_ext.integration.loading import ext_config
from sglang_modelopt_ext.integration.products import Product, count_products

logger = logging.getLogger(__name__)

STATE_KEY = "modelopt_ext"
"""The key of an entry of ``internal_states`` that has this package's part."""

OURS, SGLANGS = "modelopt_ext", "sglang"
"""Who serves weights or holds a cache."""

_SERVED = "modelopt_ext_served"
"""The attribute of a scheduler that keeps its :class:`Served`."""

INFO, LAYERS = "modelopt_ext:info", "modelopt_ext:layers"
"""The gauges: 1 with everything that holds for the whole server as labels, and the number of layers of each product."""


@dataclass(frozen=True)
class Served:
    """The owner of a model's layers and cache, and the kernels that compute the layers, on one rank.

    Attributes:
        weights: who serves the quantized layers, :data:`OURS` or :data:`SGLANGS`.
        quantization: the ``--quantization`` family of ours, None where SGLang serves the weights.
        algo: the checkpoint's ``quant_algo``, None as above and where only the KV cache is quantized.
        products: the number of layers by product.
        kv_recipe: the recipe of the KV cache, None for one that is not quantized.
        kv_pool: who holds the cache.
    """

    weights: str
    quantization: str | None
    algo: str | None
    products: dict[Product, int]
    kv_recipe: str | None
    kv_pool: str

    def as_state(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "version": __version__,
            "weights": self.weights,
            "quantization": self.quantization,
            "quant_algo": self.algo,
            "layers": [{"count": count, **describe(product)} for product, count in self.products.items()],
            "kv_cache": {"recipe": self.kv_recipe, "pool": self.kv_pool},
        }


def served_by(model_runner: Any) -> Served:
    """Return what serves the model of SGLang's ``ModelRunner``, once its weights and its cache are there."""
    config = ext_config(model_runner.model)
    flag = model_runner.kv_cache_dtype_str
    wrapped = wrapped_plan(model_runner.server_args)
    recipe = wrapped.recipe.name if wrapped is not None else STOCK_FLAGS.get(flag)
    if flag in KV_FLAGS:
        args = model_runner.server_args
        plan = plan_for(args.model_path, args.revision, flag)
        recipe = KV_FLAGS[flag].name if plan is None else plan.describe()
    return Served(
        weights=SGLANGS if config is None else OURS,
        quantization=None if config is None else config.family,
        algo=None if config is None else config.config.algo,
        products=count_products(model_runner.model),
        kv_recipe=recipe,
        kv_pool=OURS if flag in KV_FLAGS else SGLANGS,
    )


def describe(product: Product) -> dict[str, Any]:
    """Return what tells a product from another, as JSON values."""
    scheme = product.scheme
    return {
        "kind": f"experts, {product.projections}" if product.experts else "linear",
        "quant_algo": scheme.algo,
        "weight": scheme.weight.name,
        "activation": scheme.activation.name if scheme.activation else "none",
        "smoothing": scheme.smoothing,
        "low_rank": scheme.low_rank,
        "math": product.math,
        "kernel": product.kernel,
    }


def gauges(served: Served) -> Iterator[tuple[str, dict[str, str], int]]:
    """Yield ``(gauge, labels, value)`` of each time series."""
    labels = {
        "version": __version__,
        "weights": served.weights,
        "quantization": served.quantization or "",
        "quant_algo": served.algo or "",
        "kv_recipe": served.kv_recipe or "",
        "kv_pool": served.kv_pool,
    }
    yield INFO, labels, 1
    for product, count in served.products.items():
        labels = {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in describe(product).items()
        }
        yield LAYERS, labels, count


@functools.cache
def _gauge(name: str, labels: tuple[str, ...]) -> Any:
    """Return a gauge of this process, made once: prometheus_client takes a name only once."""
    # Imported here: prometheus_client looks for PROMETHEUS_MULTIPROC_DIR, which SGLang sets, when it is imported.
    from prometheus_client import Gauge

    documentation = {
        INFO: "1, with what serves the model as labels.",
        LAYERS: "Quantized layers on this rank, by scheme and kernel.",
    }
    return Gauge(name, documentation[name], labelnames=labels, multiprocess_mode="mostrecent")


def _get_internal_state(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    answer = original(self, recv_req)
    served = getattr(self.scheduler, _SERVED, None)
    if served is not None:
        answer.internal_state[STATE_KEY] = served.as_state()
    return answer


def _emit_metrics_constants(original: Callable[..., None], self: Any) -> None:
    original(self)  # called once the model and its cache are there, without --enable-metrics too
    try:
        _publish(self)
    except Exception as error:
        # An error here would end the scheduler, of models that are left to SGLang too.
        logger.warning("modelopt_ext: /server_info and /metrics do not say what serves the model: %r", error)


def _publish(scheduler: Any) -> None:
    served = served_by(scheduler.tp_worker.model_runner)
    setattr(scheduler, _SERVED, served)
    collector = scheduler.metrics_collector
    if collector is None:
        return
    for name, labels, value in gauges(served):
        # SGLang's own labels come first in all of its time series: the model's name and this process's ranks.
        every = {**collector.labels, **labels}
        _gauge(name, tuple(every)).labels(**every).set(value)


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController.get_internal_state",
        ("self", "recv_req"),
        "/server_info would not say which kernels serve the model",
        _get_internal_state,
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.emit_metrics_constants",
        ("self",),
        "/metrics would not say which kernels serve the model",
        _emit_metrics_constants,
    ),
)
