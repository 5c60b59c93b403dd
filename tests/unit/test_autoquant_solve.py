"""The solver, against trying everything and against ModelOpt's own two solvers on the same numbers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_modelopt_ext.workflow.autoquant.solve import METHODS, Method, solve

Table = list[list[Any]]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Table, Table, float]:
    """Return costs, scores over many orders of magnitude with ties and zeros, and a budget that can be met."""
    groups = draw(st.integers(1, 5))
    sizes = [draw(st.integers(1, 4)) for _ in range(groups)]
    score = st.one_of(st.just(0.0), st.sampled_from([1e-7, 1.0]), st.floats(1e-9, 1e3))
    costs = [[draw(st.integers(1, 30)) for _ in range(size)] for size in sizes]
    scores = [[draw(score) for _ in range(size)] for size in sizes]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    return costs, scores, draw(st.integers(least, most + 1)) + draw(st.sampled_from([0.0, 0.5]))


def total(table: Table, choice: Sequence[int]) -> float:
    return sum(row[c] for row, c in zip(table, choice, strict=True))


def best_by_trying(method: Method, costs: Table, scores: Table, budget: float) -> float:
    """Return the least sum, or the least of the largest scores, of all choices within the budget."""
    value = sum if method == "gradient" else max
    allowed = [c for c in itertools.product(*(range(len(row)) for row in costs)) if total(costs, c) <= budget]
    return min(value([row[c] for row, c in zip(scores, choice, strict=True)]) for choice in allowed)


@pytest.mark.parametrize("method", METHODS)
@given(problem=problems())
@settings(max_examples=80, deadline=None)
def test_nothing_allowed_is_better(method: Method, problem: tuple[Table, Table, float]) -> None:
    costs, scores, budget = problem
    choice = solve(method, costs, scores, budget)
    assert total(costs, choice) <= budget
    picked = [row[c] for row, c in zip(scores, choice, strict=True)]
    got = sum(picked) if method == "gradient" else max(picked)
    best = best_by_trying(method, costs, scores, budget)
    assert got <= best + 1e-12 * max(max(row) for row in scores)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_nobody_meets(method: Method) -> None:
    with pytest.raises(ValueError, match=r"cheapest candidates store 7 bits, the budget is 6\.5"):
        solve(method, [[3, 9], [4, 8]], [[1.0, 0.0], [1.0, 0.0]], 6.5)


def large_problem(groups: int) -> tuple[Table, Table]:
    """Return groups of a large model's sizes, with scores that fall with the cost and spread over six decades."""
    rng = np.random.default_rng(0)
    weights = rng.choice([8192 * 10240, 8192 * 8192, 8192 * 57344, 28672 * 8192], groups)
    costs = [[int(size * bits) + 96 for bits in (4.25, 4.5, 8.0, 16.0)] for size in weights]
    scores = [[float(s), float(s * 0.7), float(s * 0.03), 0.0] for s in 10.0 ** rng.uniform(-6, 0, groups)]
    return costs, scores


@pytest.mark.parametrize("method", METHODS)
def test_a_large_model_takes_seconds(method: Method) -> None:
    costs, scores = large_problem(160)
    weights = sum(row[-1] for row in costs) / 16
    begin = time.process_time()
    choices = [solve(method, costs, scores, bits * weights) for bits in (4.5, 5.0, 6.0, 8.0)]
    assert time.process_time() - begin < 20
    sums = [total(scores, choice) for choice in choices]
    assert sums == sorted(sums, reverse=True)
    assert all(
        total(costs, choice) <= bits * weights for choice, bits in zip(choices, (4.5, 5.0, 6.0, 8.0), strict=True)
    )


SHORT_OF_THE_BEST = {("gradient", 6.5), ("kl_div", 5.0)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [4.4, 5.0, 6.5, 9.0])
def test_picks_what_modelopt_picks(method: Method, bits: float) -> None:
    """ModelOpt's searchers, unchanged, over the same costs and scores.

    ModelOpt's integer solver stops a little before the best choice, and its bisection may end above the budget: then ours is
    the better one.
    """
    algorithms = pytest.importorskip("modelopt.torch.quantization.algorithms")
    costs, scores = large_problem(24)
    if method == "gradient":  # the tolerance of ModelOpt's solver is an absolute one
        scores = [[score * 1e3 for score in row] for row in scores]
    names = {"gradient": "AutoQuantizeGradientSearcher", "kl_div": "AutoQuantizeKLDivSearcher"}
    searcher = getattr(algorithms, names[method])()
    searcher.config = searcher.default_search_config
    searcher.cost_model = "weight"
    searcher.candidate_stats = {
        str(group): {"formats": list(range(4)), "costs": row, "scores": values}
        for group, (row, values) in enumerate(zip(costs, scores, strict=True))
    }
    budget = bits * sum(row[-1] for row in costs) / 16
    found, satisfied = searcher.run_search_with_stats(budget)
    theirs, ours = [found[str(group)]["format"] for group in range(24)], solve(method, costs, scores, budget)
    if (method, bits) in SHORT_OF_THE_BEST:
        assert not satisfied or total(scores, ours) < total(scores, theirs) < 1.01 * total(scores, ours)
    else:
        assert ours == theirs
