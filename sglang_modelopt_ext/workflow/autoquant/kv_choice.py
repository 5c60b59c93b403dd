"""The choice of a recipe for the KV cache of each layer, from scores and bits alone."""

from __future__ import annotations

import math

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant.solve import solve
from sglang_modelopt_ext.workflow.autoquant.state import KVChoice, KVSearch, State
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES


def kv_bits(name: str) -> float:
    """Return the bits of a cached element, block scales included."""
    return 8 * KV_RECIPES[name].bytes_per_vector(64) / 64


def check_kv_target(names: tuple[str, ...], target: float | None) -> None:
    """Raise ModelOptExtError for a budget that no recipe fits in, or none where there is a choice."""
    if not names:
        if target is not None:
            raise ModelOptExtError.at("--kv-bits", f"{target:g}", "a search over the KV cache (--kv-formats)", "none")
        return
    least = min(map(kv_bits, names))
    if target is None and len(names) > 1:
        raise ModelOptExtError.at("command line", "--kv-bits", f"bits per cached element, from {least:g} on", "none")
    if target is not None and not least <= target < math.inf:
        expected = f"at least {least:g}, the bits of {min(names, key=kv_bits)}"
        raise ModelOptExtError.at("--kv-bits", f"{target:g}", expected, f"{target:g}")


def choose_kv(state: State, target: float | None) -> KVChoice | None:
    """Return the best recipes of at most ``target`` bits per cached element; None where the cache is not searched over.

    Raises:
        ModelOptExtError: no recipe fits in, or the search has not measured the cache.
    """
    check_kv_target(state.kv_formats, target)
    if not state.kv_formats:
        return None
    kv = _checked(state)
    names, layers = state.kv_formats, kv.layers
    total = sum(layer.elements for layer in layers)
    costs = [[kv.bits[name] * layer.elements for name in names] for layer in layers]
    scores = [[layer.scores[name] for name in names] for layer in layers]
    budget = max(kv.bits.values()) if target is None else target
    picked = solve(state.method, costs, scores, budget * total)
    chosen = [scores[index][candidate] for index, candidate in enumerate(picked)]
    return KVChoice(
        target=budget,
        bits=sum(costs[index][candidate] for index, candidate in enumerate(picked)) / total,
        score=sum(chosen) if state.method == "gradient" else max(chosen),
        formats={str(layer.number): names[candidate] for layer, candidate in zip(layers, picked, strict=True)},
    )


def _checked(state: State) -> KVSearch:
    """Return the measurements of the KV cache. Raises ModelOptExtError where there are none, or they are not legal."""
    file = state.model
    if state.kv is None:
        raise ModelOptExtError.at(file, "kv", "a finished search", "one that has not measured the KV cache")
    for name in state.kv_formats:
        if name not in KV_RECIPES or state.kv.bits.get(name) != kv_bits(name):
            raise ModelOptExtError.at(file, f"kv.bits.{name}", "the bits of a recipe", state.kv.bits.get(name))
    for layer in state.kv.layers:
        sizes = (layer.k_amax, layer.v_amax, layer.elements)
        values = (*sizes, *(layer.scores.get(name, math.nan) for name in state.kv_formats))
        if not all(0 <= value < math.inf for value in values) or not min(sizes):
            raise ModelOptExtError.at(file, f"kv.layers.{layer.number}", "finite numbers, not negative", values)
    numbers = [layer.number for layer in state.kv.layers]
    if not numbers or numbers != list(range(len(numbers))):
        raise ModelOptExtError.at(file, "kv.layers", "every layer once, in order", numbers)
    return state.kv
