"""``sglang-modelopt evaluate``: measure several checkpoints on one text and set of tasks, with intervals."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sglang_modelopt_ext.cli.command import Command, Result
from sglang_modelopt_ext.cli.serving import (
    add_server_arguments,
    add_text_arguments,
    log_files,
    server_arguments,
    text_windows,
)
from sglang_modelopt_ext.workflow.common.formatting import format_bytes, format_columns
from sglang_modelopt_ext.workflow.common.models import find_folder, served_dtype
from sglang_modelopt_ext.workflow.common.text import load_tokenizer
from sglang_modelopt_ext.workflow.evaluate.measure import assumptions, describe, folder_size
from sglang_modelopt_ext.workflow.evaluate.plots import find_pyplot, plot_intervals
from sglang_modelopt_ext.workflow.evaluate.score import (
    Interval,
    Scores,
    check_same_tokens,
    divergence_interval,
    perplexity_interval,
    ratio_interval,
    score,
)
from sglang_modelopt_ext.workflow.evaluate.tasks import TaskScore, find_lm_eval, run_tasks
from sglang_modelopt_ext.workflow.server.process import ServerProcess

SAMPLES, SEQUENCE_LENGTH = 32, 512


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The measurements of one checkpoint.

    Attributes:
        checkpoint: its name on the command line.
        algo: its quantization, or the dtype of an unquantized one.
        bits_per_weight: stored bits per weight of the quantized layers.
        bytes: of all files in its folder.
        perplexity: on the text.
        ratio: its perplexity over the first checkpoint's, from paired windows; None for the first.
        divergence: mean KL from the first checkpoint in nats; None for the first.
        tasks: lm-eval's scores.
    """

    checkpoint: str
    algo: str
    bits_per_weight: float
    bytes: int
    perplexity: Interval
    ratio: Interval | None
    divergence: Interval | None
    tasks: list[TaskScore]


class EvaluateResult(Result, frozen=True, kw_only=True):
    """The result of ``evaluate``.

    Attributes:
        tokens, windows: size of the text that perplexity is measured on.
        compared: number of these tokens, at the ends of the windows, whose distributions over the vocabulary enter the KL.
        checkpoints: in the order of the command line.
        plot: path of the plot; None without one.
        notes: assumptions where a checkpoint does not say.
    """

    tokens: int
    windows: int
    compared: int
    checkpoints: list[Evaluation]
    plot: str | None
    notes: list[str]

    def text(self) -> str:
        """Return the tables."""
        header = ["checkpoint", "quantization", "bits/weight", "size", "perplexity", "vs. first", "KL (nats)"]
        rows = [
            (
                row.checkpoint,
                row.algo,
                f"{row.bits_per_weight:.2f}",
                format_bytes(row.bytes),
                _cell(row.perplexity, 3),
                _cell(row.ratio, 4),
                _cell(row.divergence, 5),
            )
            for row in self.checkpoints
        ]
        parts = [format_columns(header, rows, left=2)]
        tasks = [
            (row.checkpoint, found.task, found.metric, f"{found.value:.4f}", _stderr(found))
            for row in self.checkpoints
            for found in row.tasks
        ]
        if tasks:
            parts.append(format_columns(("checkpoint", "task", "metric", "value", "stderr"), tasks, left=3))
        parts.append(
            f"over {self.tokens} tokens in {self.windows} windows, KL over the whole vocabulary at {self.compared} of them;\n"
            "in brackets 95 % intervals from a bootstrap over windows, paired for the comparison with the first checkpoint\n"
            "(perplexity / its perplexity)"
        )
        if self.plot:
            parts.append(f"plot: {self.plot}")
        parts += [f"note: {note}" for note in self.notes]
        return "\n\n".join(parts)


def _cell(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return "-"
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _stderr(found: TaskScore) -> str:
    return "-" if found.stderr is None else f"{found.stderr:.4f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``evaluate``."""
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="folders or names on the Hub; every other is compared with the first",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot of the intervals (PNG)")
    add_text_arguments(parser, SAMPLES, SEQUENCE_LENGTH, "modules of Python's library")
    group = parser.add_argument_group("tasks (needs lm-eval)")
    group.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="names of lm-eval's tasks")
    group.add_argument("--task-folder", type=Path, metavar="DIR", help="folder with definitions of further tasks")
    group.add_argument("--limit", type=int, help="samples of each task (default: all)")
    add_server_arguments(parser, "CHECKPOINT ...")


def run(args: argparse.Namespace) -> EvaluateResult:
    """Serve and measure one checkpoint after another."""
    folders = [find_folder(name, "CHECKPOINT") for name in args.checkpoints]
    described = [describe(folder) for folder in folders]
    # Report bad input before the first server starts.
    if args.tasks:
        find_lm_eval()
    if args.plot:
        find_pyplot()
    windows = text_windows(args, folders[0], load_tokenizer(folders[0]))
    for folder in folders:
        served_dtype(folder, args.dtype)
        check_same_tokens(text_windows(args, folder, load_tokenizer(folder)), windows, folder)
    rows: list[Evaluation] = []
    first: Scores | None = None
    for name, folder, (algo, bits) in zip(args.checkpoints, folders, described, strict=True):
        scores, tasks = _measure(args, folder, windows, first)
        rows.append(
            Evaluation(
                checkpoint=name,
                algo=algo,
                bits_per_weight=bits,
                bytes=folder_size(folder),
                perplexity=perplexity_interval(scores),
                ratio=ratio_interval(scores, first) if first else None,
                divergence=divergence_interval(scores) if first else None,
                tasks=tasks,
            )
        )
        first = first or scores
    if args.plot:
        _plot(rows, args.plot)
    return EvaluateResult(
        tokens=sum(len(window) - 1 for window in windows),
        windows=len(windows),
        compared=sum(len(kept) for kept in first.rows) if first else 0,
        checkpoints=rows,
        plot=str(args.plot) if args.plot else None,
        notes=[note for folder in folders for note in assumptions(folder)],
    )


def _measure(
    args: argparse.Namespace, folder: Path, windows: Sequence[Sequence[int]], first: Scores | None
) -> tuple[Scores, list[TaskScore]]:
    with (
        log_files(args.log) as log,
        ServerProcess(
            folder, log=log, quantization=args.quantization, arguments=server_arguments(args), record=True
        ) as server,
    ):
        scores = score(server, windows, first)
        tasks = run_tasks(server, args.tasks, folder=args.task_folder, limit=args.limit) if args.tasks else []
    return scores, tasks


def _plot(rows: Sequence[Evaluation], file: Path) -> None:
    names = [f"{row.checkpoint} ({row.bits_per_weight:.2f} bits)" for row in rows]
    panels: list[tuple[str, Sequence[str], Sequence[Interval]]] = [
        ("perplexity", names, [row.perplexity for row in rows])
    ]
    for measure, intervals in (
        ("perplexity / that of the first", [row.ratio for row in rows[1:]]),
        ("KL from the first (nats)", [row.divergence for row in rows[1:]]),
    ):
        found = [interval for interval in intervals if interval is not None]
        if found:
            panels.append((measure, names[1:], found))
    plot_intervals(panels, "95 % intervals over windows", file)


COMMAND = Command(
    "evaluate",
    "Measure checkpoints on the same text and tasks, with confidence intervals.",
    add_arguments,
    run,
    EvaluateResult,
    takes_rest=True,
)
