"""Perplexities of several checkpoints on one text, with confidence intervals, from their servers' log probabilities.

Checkpoints are compared window by window: difficulty that both share cancels, so the interval of their difference is
much narrower than that of either. Intervals are percentiles of a bootstrap over windows, with shared draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.evaluate.measure import Logprobs, divergences, positions_within
from sglang_modelopt_ext.workflow.server.client import ServerClient, vocabulary_size

CONFIDENCE = 0.95
DRAWS, SEED = 10_000, 0
BUDGET = 1 << 27
"""Budget for kept log probabilities of the first checkpoint: 512 MB."""


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """An estimate and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """The scores of a text, from a server's log probabilities.

    Attributes:
        losses: for each window the sum of -log p of its tokens, in nats.
        tokens: for each window the number of tokens in its sum.
        rows: for each window the log probabilities over the vocabulary ``[T, V]`` of its last T tokens; none where they
            were compared with those of a reference at once.
        divergences: for each window the sum of KL(reference || this) over its last T tokens, in nats; None without one.
        compared: for each window T.
    """

    losses: NDArray[np.float64]
    tokens: NDArray[np.int64]
    rows: list[Logprobs]
    divergences: NDArray[np.float64] | None = None
    compared: NDArray[np.int64] | None = None


def score(
    server: ServerClient, windows: Sequence[Sequence[int]], reference: Scores | None = None, *, progress: bool = True
) -> Scores:
    """Score every window on a running server: the log probability of each of its tokens.

    Args:
        server: the server.
        windows: tokens; the first one of each is only context.
        reference: scores of the same windows to compare distributions with; None keeps the distributions instead.
        progress: show progress on standard error.
    """
    positions = positions_within(BUDGET, vocabulary_size(server.model), len(windows))
    losses, rows, sums = [], [], []
    shown = tqdm(windows, desc="scoring", unit="window", dynamic_ncols=True, disable=not progress)
    for index, window in enumerate(shown):
        own, full = server.window_logprobs(window, min(positions, len(window) - 1))
        losses.append(-own.astype(np.float64).sum())
        if reference is None:
            rows.append(full)
        else:
            sums.append(divergences(reference.rows[index], full).sum())
    scores = Scores(np.asarray(losses), np.asarray([len(window) - 1 for window in windows]), rows)
    if reference is None:
        return scores
    compared = np.asarray([len(full) for full in reference.rows])
    return dataclasses.replace(scores, divergences=np.asarray(sums), compared=compared)


def check_same_tokens(windows: Sequence[Sequence[int]], reference: Sequence[Sequence[int]], folder: Path) -> None:
    """Raise ModelOptExtError unless a checkpoint's tokenizer turns the text into the first checkpoint's tokens."""
    if list(map(list, windows)) != list(map(list, reference)):
        raise ModelOptExtError.at(
            folder,
            "tokenizer",
            "the tokens of the first checkpoint: perplexities of other tokens do not compare",
            "others",
        )


def draw_windows(count: int) -> NDArray[np.int64]:
    """Return the bootstrap's draws, ``[DRAWS, count]``: ``count`` window numbers with replacement in each."""
    return np.random.default_rng(SEED).integers(0, count, size=(DRAWS, count))


def perplexity_interval(scores: Scores) -> Interval:
    """Return ``exp`` of the mean loss per token."""
    return _interval(scores.losses, scores.tokens)


def ratio_interval(scores: Scores, reference: Scores) -> Interval:
    """Return the perplexity over that of ``reference``, from paired windows; an interval without 1 is a difference."""
    return _interval(scores.losses - reference.losses, scores.tokens)


def divergence_interval(scores: Scores) -> Interval:
    """Return the mean KL(reference || this) over the whole vocabulary in nats, of scores with a reference."""
    if scores.divergences is None or scores.compared is None:
        raise ValueError("expected scores that were compared with a reference")
    return _interval(scores.divergences, scores.compared, exponential=False)


def _interval(sums: NDArray[np.float64], counts: NDArray[np.int64], *, exponential: bool = True) -> Interval:
    """Return the interval of the mean over all tokens, from sums and counts by window."""
    draws = draw_windows(len(sums))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    found = np.asarray([sums.sum() / counts.sum(), *np.quantile(means, [tail, 1 - tail])])
    value, low, high = np.exp(found) if exponential else found
    return Interval(value=float(value), low=float(low), high=float(high))
