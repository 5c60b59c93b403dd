"""Perplexity of several checkpoints on the same text, through the log probabilities their servers give, with intervals.

Two checkpoints are compared window by window: what both find hard cancels, and the interval of their difference is much
narrower than that of either. The intervals are percentiles of a bootstrap over windows, the same draws for every checkpoint.
"""

from __future__ import annotations

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
BUDGET = 1 << 26
"""Log probabilities kept of the first checkpoint: 256 MB."""


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """An estimate and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """What a server's log probabilities come to.

    Attributes:
        losses: for each window the sum of -log p of its tokens, in nats.
        tokens: how many tokens each sum is over.
        rows: for each window the log probabilities over the vocabulary ``[T, V]`` of its last T tokens.
    """

    losses: NDArray[np.float64]
    tokens: NDArray[np.int64]
    rows: list[Logprobs]


def score(server: ServerClient, windows: Sequence[Sequence[int]], *, progress: bool = True) -> Scores:
    """Asks a running server for the log probability of every token of ``windows``, each on its own."""
    positions = positions_within(BUDGET, vocabulary_size(server.model), len(windows))
    losses, rows = [], []
    for window in tqdm(windows, desc="scoring", unit="window", dynamic_ncols=True, disable=not progress):
        targets = np.asarray(window[1:])
        full = server.full_vocab_logprobs(window, min(positions, len(targets)))
        whole = len(full) == len(targets)
        own = full[np.arange(len(targets)), targets] if whole else server.input_logprobs(window)
        losses.append(-own.astype(np.float64).sum())
        rows.append(full)
    return Scores(np.asarray(losses), np.asarray([len(window) - 1 for window in windows]), rows)


def check_same_tokens(windows: Sequence[Sequence[int]], reference: Sequence[Sequence[int]], folder: Path) -> None:
    """Raises ModelOptExtError unless a checkpoint's tokenizer makes the same tokens of the text as the first one's."""
    if list(map(list, windows)) != list(map(list, reference)):
        raise ModelOptExtError.at(
            folder,
            "tokenizer",
            "the tokens of the first checkpoint: perplexities of other tokens do not compare",
            "others",
        )


def draw_windows(count: int) -> NDArray[np.int64]:
    """The bootstrap's draws, ``[DRAWS, count]``: as many windows as there are, with replacement."""
    return np.random.default_rng(SEED).integers(0, count, size=(DRAWS, count))


def perplexity_interval(scores: Scores) -> Interval:
    """``exp`` of the mean loss of a token."""
    return _interval(scores.losses, scores.tokens)


def ratio_interval(scores: Scores, reference: Scores) -> Interval:
    """The perplexity over that of ``reference``, from paired windows: an interval without 1 is a difference."""
    return _interval(scores.losses - reference.losses, scores.tokens)


def divergence_interval(scores: Scores, reference: Scores) -> Interval:
    """Mean KL(reference || this) over the whole vocabulary, in nats."""
    sums = [divergences(p, q).sum() for p, q in zip(reference.rows, scores.rows, strict=True)]
    counts = [len(rows) for rows in scores.rows]
    return _interval(np.asarray(sums), np.asarray(counts), exponential=False)


def _interval(sums: NDArray[np.float64], counts: NDArray[np.int64], *, exponential: bool = True) -> Interval:
    """Of the mean over all tokens, from sums and counts by window."""
    draws = draw_windows(len(sums))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    found = np.asarray([sums.sum() / counts.sum(), *np.quantile(means, [tail, 1 - tail])])
    value, low, high = np.exp(found) if exponential else found
    return Interval(value=float(value), low=float(low), high=float(high))
