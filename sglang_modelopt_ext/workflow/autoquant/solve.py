"""The choice of a format for each group of layers, from scores and costs alone. Imports neither torch nor ModelOpt.

Two rules, those of ModelOpt 0.47's two searchers:

* ``gradient``: the least sum of scores within the budget, an integer program (ModelOpt: ``AutoQuantizeGradientSearcher``).
* ``kl_div``: the least threshold such that every group takes its cheapest format with a score at or below it
  (``AutoQuantizeKLDivSearcher``, which bisects for it; here it is exact).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Method = Literal["gradient", "kl_div"]
METHODS: tuple[Method, ...] = ("gradient", "kl_div")

_LARGEST_SCORE = 1e6  # HiGHS stops within an absolute gap of 1e-6, which this makes 1e-12 of the largest score.
_SECONDS = 60.0


def solve(
    method: Method, costs: Sequence[Sequence[float]], scores: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """Return the chosen candidate of each group, by index.

    Args:
        method: the rule.
        costs: stored bits of each candidate of each group.
        scores: sensitivity of each candidate, not negative.
        budget: the bits all groups together may store.

    Raises:
        ValueError: the cheapest candidates together are above the budget.
    """
    least = sum(min(group) for group in costs)
    if least > budget:
        raise ValueError(f"the cheapest candidates store {least} bits, the budget is {budget:g}")
    return (_least_sum if method == "gradient" else _least_threshold)(costs, scores, budget)


def _least_sum(costs: Sequence[Sequence[float]], scores: Sequence[Sequence[float]], budget: float) -> list[int]:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    kept = [_worth_a_look(group, values) for group, values in zip(costs, scores, strict=True)]
    index = [(g, c) for g, candidates in enumerate(kept) for c in candidates]
    cost = np.array([costs[g][c] for g, c in index], dtype=np.float64)
    score = np.array([scores[g][c] for g, c in index], dtype=np.float64)
    one_each = np.zeros((len(kept), len(index)))
    one_each[[g for g, _ in index], range(len(index))] = 1.0
    largest = float(score.max())
    solution = milp(
        score * (_LARGEST_SCORE / largest) if largest > 0 else score,
        integrality=np.ones(len(index)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost[np.newaxis] / budget, -np.inf, 1.0)],
        options={"mip_rel_gap": 0.0, "time_limit": _SECONDS},
    )
    if solution.x is None:
        choice = [min(candidates, key=lambda c: costs[g][c]) for g, candidates in enumerate(kept)]
    else:
        picked = np.asarray(solution.x)
        choice = [max((picked[i], c) for i, (h, c) in enumerate(index) if h == g)[1] for g in range(len(kept))]
    return _polish(choice, kept, costs, scores, budget)


def _worth_a_look(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Return the candidates that no other one matches or beats in both cost and score, cheapest first."""
    kept: list[int] = []
    for candidate in sorted(range(len(costs)), key=lambda c: (costs[c], scores[c])):
        if not kept or scores[candidate] < scores[kept[-1]]:
            kept.append(candidate)
    return kept


def _polish(
    choice: list[int],
    kept: Sequence[Sequence[int]],
    costs: Sequence[Sequence[float]],
    scores: Sequence[Sequence[float]],
    budget: float,
) -> list[int]:
    """Return a choice free of the solver's tolerances: within the budget to the bit, without a better single change."""
    total = sum(costs[g][c] for g, c in enumerate(choice))
    while total > budget:
        moves = [
            ((scores[g][c] - scores[g][choice[g]]) / (costs[g][choice[g]] - costs[g][c]), g, c)
            for g, candidates in enumerate(kept)
            for c in candidates
            if costs[g][c] < costs[g][choice[g]]
        ]
        _, g, c = min(moves)
        total += costs[g][c] - costs[g][choice[g]]
        choice[g] = c
    while True:
        moves = [
            (scores[g][c] - scores[g][choice[g]], g, c)
            for g, candidates in enumerate(kept)
            for c in candidates
            if scores[g][c] < scores[g][choice[g]] and total + costs[g][c] - costs[g][choice[g]] <= budget
        ]
        if not moves:
            return choice
        _, g, c = min(moves)
        total += costs[g][c] - costs[g][choice[g]]
        choice[g] = c


def _least_threshold(costs: Sequence[Sequence[float]], scores: Sequence[Sequence[float]], budget: float) -> list[int]:
    thresholds = sorted({score for group in scores for score in group})
    low, high = 0, len(thresholds) - 1  # the largest threshold allows every candidate, which is within the budget
    while low < high:
        middle = (low + high) // 2
        choice = _at_threshold(costs, scores, thresholds[middle])
        if choice is not None and sum(costs[g][c] for g, c in enumerate(choice)) <= budget:
            high = middle
        else:
            low = middle + 1
    found = _at_threshold(costs, scores, thresholds[low])
    assert found is not None, "the largest threshold allows every candidate"
    return found


def _at_threshold(
    costs: Sequence[Sequence[float]], scores: Sequence[Sequence[float]], threshold: float
) -> list[int] | None:
    """Return each group's cheapest candidate with a score of at most ``threshold``, of equals the better, or None."""
    choice = []
    for group, values in zip(costs, scores, strict=True):
        allowed = [c for c, score in enumerate(values) if score <= threshold]
        if not allowed:
            return None
        choice.append(min(allowed, key=lambda c: (group[c], values[c])))
    return choice
