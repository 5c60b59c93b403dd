"""The cost and gain of quantization, measured on running servers: perplexity, divergence, speed and size.

Every figure comes from the measured server: log probabilities are computed from its logits, by itself, tokens per second are
wall time of a request, sizes are those of the files it serves.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sglang_modelopt_ext.checkpoint.quant_config import read_quant_config
from sglang_modelopt_ext.checkpoint.reader import assumption, bits_per_weight, read_checkpoint
from sglang_modelopt_ext.checkpoint.tensors import read_json_object
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common.formatting import format_columns
from sglang_modelopt_ext.workflow.common.progress import elapsed_progress
from sglang_modelopt_ext.workflow.server.process import ServerProcess

Logprobs = NDArray[np.float32]

_UNQUANTIZED_BITS = {"bfloat16": 16.0, "float16": 16.0, "float32": 32.0}
_ROWS = 4
_SHORT_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Plan:
    """The requests that every server gets.

    Attributes:
        windows: held-out tokens, each window scored on its own; its first token is only context.
        divergence_positions: number of positions at the end of each window that are compared over the whole vocabulary.
        speed_prompts: prompts of the timed batch.
        speed_tokens: tokens generated for each prompt.
    """

    windows: Sequence[Sequence[int]]
    divergence_positions: int
    speed_prompts: Sequence[str]
    speed_tokens: int = 64

    @property
    def scored_tokens(self) -> int:
        """Return the number of tokens whose probability enters the perplexity."""
        return sum(len(window) - 1 for window in self.windows)

    @property
    def compared_tokens(self) -> int:
        """Return the number of positions whose distributions enter the divergence."""
        return sum(min(self.divergence_positions, len(window) - 1) for window in self.windows)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: the recipe.
        size: bytes of all files in the checkpoint's folder.
        bits: stored bits per weight of the linear layers that recipes quantize.
        perplexity: on the plan's windows.
        divergence: mean KL(reference || this) in nats; None for the reference itself.
        speed: generated tokens per second.
    """

    name: str
    size: int
    bits: float
    perplexity: float
    divergence: float | None
    speed: float


def positions_within(values: int, vocabulary: int, windows: int) -> int:
    """Return the number of positions of each window that fit a total of ``values`` log probabilities; at least 1."""
    return max(1, values // max(1, vocabulary * windows))


def measure(
    server: ServerProcess, plan: Plan, reference: Sequence[Logprobs] | None = None, *, progress: bool = True
) -> tuple[Row, list[Logprobs]]:
    """Measure a running server.

    Args:
        server: the server.
        plan: the requests.
        reference: the full-vocabulary log probabilities of the unquantized server under the same plan.
        progress: show progress on standard error.

    Returns:
        The row, and this server's full-vocabulary log probabilities, which can serve as a reference.
    """
    scored: list[Logprobs] = []
    full: list[Logprobs] = []
    for window in tqdm(plan.windows, desc="scoring", unit="window", dynamic_ncols=True, disable=not progress):
        own, rows = server.window_logprobs(window, min(plan.divergence_positions, len(window) - 1))
        scored.append(own)
        full.append(rows)
    with elapsed_progress("tokens per second", progress):
        speed = tokens_per_second(server, plan.speed_prompts, plan.speed_tokens)
    name, bits = describe(server.model)
    divergence = None if reference is None else mean_divergence(reference, full)
    return Row(name, folder_size(server.model), bits, perplexity(scored), divergence, speed), full


def perplexity(logprobs: Iterable[Logprobs]) -> float:
    """Return ``exp`` of the mean negative log probability over all tokens of all windows."""
    values = np.concatenate([window.astype(np.float64) for window in logprobs])
    return float(np.exp(-values.mean()))


def divergences(reference: Logprobs, other: Logprobs) -> NDArray[np.float64]:
    """Return KL(reference || other) in nats for every row of two ``[T, V]`` arrays of log probabilities."""
    if reference.shape != other.shape:
        raise ValueError(f"expected two arrays of one shape, got {reference.shape} and {other.shape}")
    found = np.empty(len(reference))
    # A few rows at a time stay in the processor's cache.
    for start in range(0, len(found), _ROWS):
        rows = slice(start, start + _ROWS)
        log_p, log_q = reference[rows].astype(np.float64), other[rows].astype(np.float64)
        p = np.exp(log_p)
        # A token of probability zero under the reference contributes zero, whatever its probability under the other.
        ratio = np.subtract(log_p, log_q, where=p > 0, out=np.zeros_like(p))
        found[rows] = (p * ratio).sum(axis=-1)
    return found


def mean_divergence(reference: Sequence[Logprobs], other: Sequence[Logprobs]) -> float:
    """Return the mean of :func:`divergences` over all positions of all windows."""
    return float(np.concatenate([divergences(p, q) for p, q in zip(reference, other, strict=True)]).mean())


def tokens_per_second(server: ServerProcess, prompts: Sequence[str], new_tokens: int) -> float:
    """Return generated tokens per second of wall time for one greedy batch, prefill included, after a warm-up."""
    server.generate(prompts, 4, ignore_eos=True)
    server.flush_cache()
    begin = time.perf_counter()
    answers = server.generate(prompts, new_tokens, ignore_eos=True)
    seconds = time.perf_counter() - begin
    return sum(answer.tokens for answer in answers) / seconds


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in ``folder``, links followed."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def describe(folder: Path) -> tuple[str, float]:
    """Return a checkpoint's recipe and the stored bits per weight of its quantized linear layers.

    For an unquantized one: the dtype of its weights and that dtype's bits.
    """
    config = read_quant_config(folder)
    if config is not None:
        return config.algo or "unquantized", bits_per_weight(read_checkpoint(folder, config))
    content = read_json_object(folder / "config.json")
    dtype = content.get("dtype", content.get("torch_dtype", "bfloat16"))
    if dtype not in _UNQUANTIZED_BITS:
        raise ModelOptExtError.at(folder / "config.json", "dtype", f"one of {', '.join(_UNQUANTIZED_BITS)}", dtype)
    return _SHORT_NAMES[dtype], _UNQUANTIZED_BITS[dtype]


def assumptions(folder: Path) -> list[str]:
    """Return every assumption that a reader of the checkpoint has to make because the checkpoint does not say."""
    config = read_quant_config(folder)
    assumed = None if config is None else assumption(config)
    return [assumed] if assumed else []


def format_table(rows: Sequence[Row]) -> str:
    """Return the rows as aligned columns under a header."""
    header = ("recipe", "size on disk", "bits/weight", "perplexity", "KL (nats)", "tokens/s")
    return format_columns(header, [_cells(row) for row in rows])


def _cells(row: Row) -> tuple[str, ...]:
    divergence = "-" if row.divergence is None else f"{row.divergence:.5f}"
    return (
        row.name,
        f"{row.size / 1e6:.2f} MB",
        f"{row.bits:.2f}",
        f"{row.perplexity:.3f}",
        divergence,
        f"{row.speed:.1f}",
    )


def format_legend(plan: Plan) -> str:
    """Return the meaning of the table's columns, with the figures of this run."""
    batch = len(plan.speed_prompts)
    return "\n".join(
        (
            "size on disk: every file of the checkpoint's folder; embeddings and lm_head are not quantized.",
            "bits/weight:  stored bits per weight, block scales included, of the quantized linear layers only.",
            f"perplexity:   over {plan.scored_tokens} held-out tokens in {len(plan.windows)} separate windows.",
            f"KL:           mean KL(unquantized || this) over the whole vocabulary at {plan.compared_tokens} of "
            "these positions.",
            f"tokens/s:     greedy decode, one batch of {batch} x {plan.speed_tokens} new tokens, wall time with "
            "its prompts.",
        )
    )
