"""A verdict on a server: its log probabilities against those of its checkpoint's decoded export.

The limit is measured, not chosen: the decoded export is run a second time in the server's dtype. That run's error is
rounding alone, and a correct server's error is of that size, since both round at other places. A server whose error is
more than :data:`FACTOR` times as large fails.

In float32 one such run is not enough. Its errors of 1e-7 matter only where an activation lies that near the middle of
two codes (or an amax that near the next block scale): there the code flips, and that token and those that attend to it
move by up to a nat. A run has a handful of flips or none, so one run does not predict the next. Instead of several
runs, each with a few of the possible flips, one more run makes every one (:func:`reference.other_side`): no correct
server has more, and the limit does not depend on chance. That widens the limit of the means. The median of a correct
server, which a few flips do not move, is compared with the error of one float32 run, so that a wrong scale, which moves
every token, is still found; with its third quartile, since a correct server may have :data:`FACTOR` times as many tokens
that a flip has moved. In bfloat16 every token has many flips: one run measures them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from sglang_modelopt_ext.checkpoint.kv_cache import KVCachePlan, read_plan
from sglang_modelopt_ext.checkpoint.quant_config import read_quant_config
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common.models import served_dtype
from sglang_modelopt_ext.workflow.common.progress import elapsed_progress
from sglang_modelopt_ext.workflow.evaluate.measure import (
    Logprobs,
    assumptions,
    divergences,
    perplexity,
    positions_within,
)
from sglang_modelopt_ext.workflow.server.client import ServerClient, vocabulary_size
from sglang_modelopt_ext.workflow.verify.reference import ReferenceModel

FACTOR = 2.0
"""Factor on rounding alone that a server's error may reach; squared for the divergence, which is quadratic in it."""

RESOLUTION = 1e-5
"""Smallest difference of log probabilities, in nats: float32 resolves 2e-6 from 16 to 32, and its sums less."""

NORMALIZATION = 1e-7
"""Smallest divergence, in nats: the error of a float32 sum of probabilities, which should be 1, enters it directly."""

BUDGET = 1 << 26
"""Budget for kept log probabilities of each model: 256 MB."""

WORST = 5


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """The distance of a model's log probabilities from those of the decoded export.

    Attributes:
        mean_abs_logprob: mean |difference| of the log probability of the text's own tokens, in nats.
        median_abs_logprob, upper_quartile_abs_logprob: median and third quartile of these differences.
        divergence: mean KL(decoded export || this) over the whole vocabulary, in nats.
        same_top: share of positions with the same likeliest token.
    """

    mean_abs_logprob: float
    median_abs_logprob: float
    upper_quartile_abs_logprob: float
    divergence: float
    same_top: float


class WorstToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token whose served log probability is far from the expected one."""

    window: int
    position: int
    token: int
    text: str
    served: float
    expected: float


class AgainstBase(msgspec.Struct, frozen=True, kw_only=True):
    """The checkpoint compared with its unquantized model, at the same tokens.

    Attributes:
        base: the model's folder.
        perplexity, export_perplexity, served_perplexity: of the model, of the decoded export and of the server.
        export_divergence, served_divergence: mean KL from the model, in nats.
    """

    base: str
    perplexity: float
    export_perplexity: float
    served_perplexity: float
    export_divergence: float
    served_divergence: float


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """The result of :func:`verify`.

    Attributes:
        folder: the checkpoint.
        server: its URL; ``served_model``: the path of the model it reports.
        dtype: the server's dtype.
        target: the server's device.
        kv_cache: the recipe of its KV cache, None where that is not quantized or not compared (see ``notes``).
        windows, tokens: numbers of compared windows and tokens.
        served: the server against the decoded export.
        rounding: the decoded export run in ``dtype`` against itself in more precision: the noise floor.
        ties: the decoded export in ``dtype`` with every activation, key and value that float32 may round either way
            rounded the other way; None in other dtypes, where ``rounding`` contains thousands of such flips.
        repeated: the first window served twice, compared with itself; zeros where the server repeats its answers.
        factor: multiple of the largest of ``rounding``, ``ties`` and ``repeated`` that is the limit (for the divergence
            its square; for the median, the third quartile of ``rounding`` and ``repeated``).
        limits: the resulting limits.
        base: the comparison with the unquantized model, where one was given.
        simulated: ModelOpt's simulation of the checkpoint against its decoded export, where there is a base model and
            its metadata suffices. It has no limit: ModelOpt exports layers that servers fuse under one global scale, or
            one smoothing, and simulates each under its own.
        worst: the tokens that differ most.
        failures: the values above their limits; empty when the checkpoint passes.
        notes: comparisons that were not made, and assumptions where the checkpoint does not say.
    """

    folder: str
    server: str
    served_model: str
    dtype: str
    target: str
    kv_cache: str | None
    windows: int
    tokens: int
    served: Difference
    rounding: Difference
    ties: Difference | None
    repeated: Difference
    factor: float
    limits: dict[str, float]
    base: AgainstBase | None
    simulated: Difference | None
    worst: list[WorstToken]
    failures: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Served:
    """A server's answers, to be compared after it has stopped.

    Attributes:
        url, model: of the server.
        dtype: the server's dtype.
        kv_cache_dtype: the flag it resolved to.
        rows: for each window the log probabilities over the vocabulary ``[T, V]`` of its last T tokens.
        again: the rows of the first window, served a second time.
    """

    url: str
    model: str
    dtype: torch.dtype
    kv_cache_dtype: str
    rows: list[Logprobs]
    again: Logprobs


def ask_server(server: ServerClient, windows: Sequence[Sequence[int]], *, progress: bool = True) -> Served:
    """Request all answers. Raises ModelOptExtError when the server fails or serves another vocabulary."""
    info = server.server_info()
    positions = positions_within(BUDGET, vocabulary_size(server.model), len(windows))
    rows = []
    for window in tqdm(windows, desc="querying the server", unit="window", dynamic_ncols=True, disable=not progress):
        rows.append(server.full_vocab_logprobs(window, min(positions, len(window) - 1)))
    server.flush_cache()
    again = server.full_vocab_logprobs(windows[0], len(rows[0]))
    return Served(
        url=server.url,
        model=str(info.get("model_path")),
        dtype=served_dtype(server.model, str(info.get("dtype", "auto"))),
        kv_cache_dtype=str(info.get("kv_cache_dtype", "auto")),
        rows=rows,
        again=again,
    )


def check_base(base: Path) -> None:
    """Raise ModelOptExtError when the base model of a comparison is itself quantized."""
    if read_quant_config(base) is not None:
        raise ModelOptExtError.at(base, "--base", "the unquantized model", "a quantized one")


def verify(
    folder: Path,
    served: Served,
    windows: Sequence[Sequence[int]],
    target: Device,
    *,
    base: Path | None = None,
    simulate: bool = True,
    show: Callable[[int], str] = str,
    progress: bool = True,
) -> Verification:
    """Compare a server's answers with the decoded export of ``folder``.

    Args:
        folder: the checkpoint.
        served: the server's answers to ``windows``.
        windows: tokens.
        target: where the server runs.
        base: the unquantized model, to show the effect of quantization itself.
        simulate: calibrate ``base`` again, for ModelOpt's simulation.
        show: returns the text of a token.
        progress: show progress on standard error.

    Raises:
        ModelOptExtError: a checkpoint that cannot be read, or a base model that is quantized or has another vocabulary.
    """
    if base:
        check_base(base)
    kv_cache, notes = _kv_cache(folder, served, target)
    notes += assumptions(folder)
    # The expected values have more precision than the server.
    exact = torch.float64 if served.dtype == torch.float32 else torch.float32
    expected = _reference(folder, exact, target, kv_cache, windows, served.rows, "decoding the export", progress)
    dtype_name = str(served.dtype).removeprefix("torch.")
    rounded = _reference(folder, served.dtype, target, kv_cache, windows, served.rows, f"in {dtype_name}", progress)
    flipped = (
        _reference(
            folder, served.dtype, target, kv_cache, windows, served.rows, "ties rounded the other way", progress, True
        )
        if served.dtype == torch.float32
        else None
    )
    targets = [np.asarray(window[len(window) - len(rows) :]) for window, rows in zip(windows, served.rows, strict=True)]
    difference = compare(expected, served.rows, targets)
    rounding = compare(expected, rounded, targets)
    ties = compare(expected, flipped, targets) if flipped else None
    repeated = compare(served.rows[:1], [served.again], targets[:1])
    noise = [rounding, repeated]
    floors = [*noise, ties] if ties else noise
    limits = {
        "mean_abs_logprob": FACTOR * max(RESOLUTION, *(floor.mean_abs_logprob for floor in floors)),
        "median_abs_logprob": FACTOR * max(RESOLUTION, *(floor.upper_quartile_abs_logprob for floor in noise)),
        "divergence": FACTOR**2 * max(NORMALIZATION, *(floor.divergence for floor in floors)),
    }
    # Negated, so that NaN fails.
    failures = [
        f"{name} is {getattr(difference, name):.3g}, above its limit {limit:.3g}"
        for name, limit in limits.items()
        if not getattr(difference, name) <= limit
    ]
    against_base = _against_base(base, expected, served.rows, windows, targets, progress) if base else None
    simulated = None
    if base and simulate:
        simulated, reason = _simulated(folder, base, windows, expected, targets, progress)
        notes += [f"ModelOpt's simulation: not compared, {reason}"] if reason else []
    return Verification(
        folder=str(folder),
        server=served.url,
        served_model=served.model,
        dtype=dtype_name,
        target=target.flag,
        kv_cache=kv_cache.recipe.name if kv_cache else None,
        windows=len(windows),
        tokens=sum(map(len, targets)),
        served=difference,
        rounding=rounding,
        ties=ties,
        repeated=repeated,
        factor=FACTOR,
        limits=limits,
        base=against_base,
        simulated=simulated,
        worst=_worst(expected, served.rows, windows, show),
        failures=failures,
        notes=notes,
    )


def _kv_cache(folder: Path, served: Served, target: Device) -> tuple[KVCachePlan | None, list[str]]:
    """Return the rounding of keys and values in the reference, and a note where it differs from the server's."""
    plan = read_plan(folder, read_quant_config(folder), served.kv_cache_dtype)
    if plan is not None and target.kind == "cuda":
        chunk = "on a GPU, attention within a prefill chunk uses unquantized keys and values"
        note = f"KV cache {plan.recipe.name}: not compared: {chunk}"
        return None, [note]
    return plan, []


def _reference(
    folder: Path,
    dtype: torch.dtype,
    target: Device,
    kv_cache: KVCachePlan | None,
    windows: Sequence[Sequence[int]],
    like: Sequence[Logprobs],
    label: str,
    progress: bool,
    ties: bool = False,
) -> list[Logprobs]:
    """Return the log probabilities of the decoded export at the positions of ``like``, and free the model."""
    with elapsed_progress(f"{label}: loading", progress):
        model = ReferenceModel(folder, dtype, target, kv_cache, ties)
    found = []
    pairs = zip(windows, like, strict=True)
    for window, rows in tqdm(
        pairs, desc=label, total=len(windows), unit="window", dynamic_ncols=True, disable=not progress
    ):
        logprobs = model.logprobs(window)
        if logprobs.shape[1] != rows.shape[1]:
            raise ModelOptExtError.at(folder, "vocab_size", f"{rows.shape[1]}, as the server's", logprobs.shape[1])
        found.append(logprobs[-len(rows) :])
    return found


def compare(
    expected: Sequence[Logprobs], other: Sequence[Logprobs], targets: Sequence[NDArray[np.int64]]
) -> Difference:
    """Return the distance of ``other`` from ``expected``.

    Args:
        expected, other: for each window, log probabilities ``[T, V]``.
        targets: for each window, the tokens ``[T]`` whose probabilities the rows hold.
    """
    apart, divergence, same = [], [], []
    for p, q, tokens in zip(expected, other, targets, strict=True):
        index = np.arange(len(tokens)), tokens
        apart.append(np.abs(p[index].astype(np.float64) - q[index]))
        divergence.append(divergences(p, q))
        same.append(p.argmax(axis=-1) == q.argmax(axis=-1))
    median, upper_quartile = np.quantile(np.concatenate(apart), [0.5, 1 - 0.5 / FACTOR])
    return Difference(
        mean_abs_logprob=float(np.concatenate(apart).mean()),
        median_abs_logprob=float(median),
        upper_quartile_abs_logprob=float(upper_quartile),
        divergence=float(np.concatenate(divergence).mean()),
        same_top=float(np.concatenate(same).mean()),
    )


def _against_base(
    base: Path,
    expected: Sequence[Logprobs],
    served: Sequence[Logprobs],
    windows: Sequence[Sequence[int]],
    targets: Sequence[NDArray[np.int64]],
    progress: bool,
) -> AgainstBase:
    rows = _reference(base, torch.float32, Device.cpu(), None, windows, served, "the base model", progress)

    def of(model: Sequence[Logprobs]) -> float:
        return perplexity(row[np.arange(len(tokens)), tokens] for row, tokens in zip(model, targets, strict=True))

    return AgainstBase(
        base=str(base),
        perplexity=of(rows),
        export_perplexity=of(expected),
        served_perplexity=of(served),
        export_divergence=compare(rows, expected, targets).divergence,
        served_divergence=compare(rows, served, targets).divergence,
    )


def _simulated(
    folder: Path,
    base: Path,
    windows: Sequence[Sequence[int]],
    expected: Sequence[Logprobs],
    targets: Sequence[NDArray[np.int64]],
    progress: bool,
) -> tuple[Difference | None, str | None]:
    """Return the distance of ModelOpt's simulation from the decoded export, or the reason why it was not made."""
    from sglang_modelopt_ext.workflow.verify import simulation  # imports ModelOpt

    reason = simulation.objection(folder)
    if reason is not None:
        return None, reason
    try:
        rows = simulation.simulate(folder, base, windows, expected, progress)
    except ModelOptExtError as error:
        return None, error.one_line()
    return compare(expected, rows, targets), None


def _worst(
    expected: Sequence[Logprobs],
    served: Sequence[Logprobs],
    windows: Sequence[Sequence[int]],
    show: Callable[[int], str],
) -> list[WorstToken]:
    found = []
    for index, (p, q, window) in enumerate(zip(expected, served, windows, strict=True)):
        first = len(window) - len(q)
        for row in range(len(q)):
            token = window[first + row]
            found.append(
                WorstToken(
                    window=index,
                    position=first + row,
                    token=token,
                    text=show(token),
                    served=float(q[row, token]),
                    expected=float(p[row, token]),
                )
            )
    return heapq.nlargest(WORST, found, key=lambda worst: abs(worst.served - worst.expected))
