"""``sglang-modelopt auto-quantize``: choose a format for every layer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_modelopt_ext.cli.command import Command, Result
from sglang_modelopt_ext.device import NAMED, Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant.solve import METHODS
from sglang_modelopt_ext.workflow.autoquant.state import FILE_NAME, FLAGS, MODEL_OF, UNQUANTIZED, Group, Report, Target
from sglang_modelopt_ext.workflow.autoquant.state import Result as Solved

if TYPE_CHECKING:
    import torch

    from sglang_modelopt_ext.backends.product import Product
    from sglang_modelopt_ext.backends.timings import TuningFile
    from sglang_modelopt_ext.workflow.autoquant.latency import Table
    from sglang_modelopt_ext.workflow.common.processes import Processes

GPUS = [device.flag for device in NAMED]
_LM_HEAD = {
    "excluded": "unquantized and not counted",
    "counted": "counted, unquantized",
    "searched": "searched over and counted",
}
_OF_RECIPE = ("formats", "method", "lm_head", "exclude")
"""Options that a recipe has itself."""
_FIXED = (
    "formats",
    "recipe",
    "method",
    "gpu",
    "lm_head",
    "exclude",
    "loss_scale",
    "samples",
    "sequence_length",
    "seed",
    "score_samples",
    "latency_table",
    "latency_tokens",
    "kv_formats",
    "scored_as",
)


class AutoQuantized(Result, frozen=True, kw_only=True):
    """The result of a search.

    Attributes:
        output: the folder that was written; None for none.
        report: the content of ``autoquant.json``; None where only times were measured.
        times: the file of times, if one was read or made.
    """

    output: str | None
    report: Report | None
    times: str | None = None

    def text(self) -> str:
        """Return the choice of every layer, then a line for each target."""
        if self.report is None:
            return f"times:      {self.times}"
        return self._searched(self.report)

    def _searched(self, report: Report) -> str:
        state, results = report.state, report.results
        lm_head = _LM_HEAD[state.lm_head]
        lines = [
            *_layers(report),
            "",
            *_cache(report),
            *_table(
                [
                    ("format", "bits", f"served on {state.gpu} by", "as"),
                    *((_short(row.name), f"{row.bits:g}", row.served_by[0], row.served_as) for row in state.formats),
                ]
            ),
            "",
            *_table(
                [("target", "bits", "us", "stored", "quantized", "perplexity", "checkpoint"), *map(self._row, results)]
            ),
            "",
            f"bits:       for each weight of {_count(state.groups)} linear layers by cost,"
            f" every scale included; lm_head {lm_head}",
            "stored:     the same, measured from the bytes of the checkpoint; quantized: of its quantized layers only",
        ]
        if state.latency is not None:
            lines.append(
                f"us:         of the same layers, measured one by one on {state.latency.gpu} with {state.latency.tokens} tokens"
                " at a time"
            )
        if (held_out := report.held_out) is not None:
            lines.append(
                f"perplexity: of the {MODEL_OF[state.scored_as]} model on {held_out.tokens} held-out tokens;"
                f" unquantized {report.unquantized_perplexity:.4f}"
            )
        if self.output is not None:
            lines.append(f"written:    {Path(self.output) / FILE_NAME} and plots beside it")
        return "\n".join(lines)

    def _row(self, result: Solved) -> tuple[str, ...]:
        measured = result.measured
        folder = "-" if measured.folder is None or self.output is None else str(Path(self.output) / measured.folder)
        figures = (measured.stored_bits, measured.quantized_bits, measured.perplexity)
        cells = ("-" if value is None else f"{value:.4f}" for value in figures)
        us = "-" if result.choice.us is None else f"{result.choice.us:.1f}"
        return _goal(result), f"{result.choice.bits:.4f}", us, *cells, folder


def _goal(result: Solved) -> str:
    return f"{result.choice.target:g}" + (" us" if result.choice.unit == "us" else "")


def _cache(report: Report) -> list[str]:
    """Return the scores and the choice of the KV cache of every layer."""
    found = report.results[0].choice.kv if report.results else None
    if report.state.kv is None or found is None:
        return []
    rows: list[tuple[str, ...]] = [("KV cache of layer", "score by recipe", f"target {found.target:g}")]
    for layer in report.state.kv.layers:
        scores = ", ".join(f"{name} {score:.3g}" for name, score in layer.scores.items())
        rows.append((str(layer.number), scores, found.formats[str(layer.number)]))
    return [*_table(rows), "", f"KV cache:   {found.bits:.4f} bits per element, block scales included", ""]


def _count(groups: Sequence[Group]) -> int:
    return sum(layer.count for group in groups for layer in group.layers)


def _layers(report: Report) -> list[str]:
    header = ("layers", "score by format", *(f"target {_goal(result)}" for result in report.results))
    rows = [header]
    for group in report.state.groups:
        scores = [f"{_short(name)} {c.score:.3g}" for name, c in group.candidates.items() if name != UNQUANTIZED]
        first, *others = group.modules
        names = "+".join([first, *(name.rpartition(".")[2] for name in others)])
        chosen = (_short(result.choice.formats[group.name]) for result in report.results)
        rows.append((names, ", ".join(scores) or "left unquantized", *chosen))
    return _table(rows)


def _short(name: str) -> str:
    return "unquantized" if name == UNQUANTIZED else name.removesuffix("_CFG")


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``auto-quantize``."""
    parser.add_argument("model", nargs="?", help="folder of the unquantized model, or its name on the Hugging Face Hub")
    parser.add_argument(
        "--bits", "--target-bits", dest="targets", type=float, nargs="+", default=[], metavar="F",
        help="bits per weight, scales included; several values make several checkpoints (default: the recipe's)",
    )  # fmt: skip
    parser.add_argument(
        "--target-latency", dest="latencies", type=float, nargs="+", default=[], metavar="US",
        help="microseconds of all counted layers together, by --latency-table; several values make several checkpoints",
    )  # fmt: skip
    parser.add_argument(
        "--latency-table", type=Path, metavar="FILE",
        help="times of the layers; on the GPU that is to serve the result, those that it lacks are measured and added",
    )  # fmt: skip
    parser.add_argument(
        "--latency-tokens", type=int, metavar="M", help="tokens at a time that the times are of (default: 1)"
    )
    parser.add_argument(
        "--measure-only", action="store_true", help="measure what --latency-table lacks on this GPU, and end"
    )
    parser.add_argument(
        "--kv-formats",
        metavar="A,B",
        help="recipes for the KV cache of each layer: fp8,nvfp4 or one of them (default: none)",
    )
    parser.add_argument(
        "--kv-bits", type=float, metavar="F", help="bits per element of the KV cache, block scales included"
    )
    parser.add_argument("--output", "--export-dir", type=Path, metavar="DIR", help="output folder")
    parser.add_argument("--formats", metavar="A,B", help="candidates, such as W4A8_NVFP4_FP8,FP8,NVFP4_AWQ")
    parser.add_argument(
        "--recipe", metavar="NAME",
        help="a search of ModelOpt's recipe library, or a recipe file, instead of --formats (quantize --list shows them)",
    )  # fmt: skip
    parser.add_argument(
        "--data", nargs="+", metavar="F", help="text to calibrate on: .txt, .jsonl, .parquet or a data set"
    )
    parser.add_argument("--held-out", nargs="+", metavar="F", help="text to measure on (default: a fifth of --data)")
    parser.add_argument("--method", choices=METHODS, help="how sensitivity is scored (default: gradient)")
    parser.add_argument(
        "--scored-as", choices=("simulation", "export"),
        help="score ModelOpt's simulation (the default), or what the --gpu serves of the export",
    )  # fmt: skip
    parser.add_argument("--gpu", choices=GPUS, help="the GPU that is to serve the result (default: this machine's)")
    parser.add_argument(
        "--lm-head", choices=("excluded", "counted", "searched"),
        help="the lm_head: unquantized and not counted in the bits (the default), counted, or searched over like other layers",
    )  # fmt: skip
    parser.add_argument(
        "--exclude", action="append", metavar="PATTERN",
        help="leave these layers unquantized; their bits count; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--from-state", type=Path, metavar="FILE", help=f"choose from the {FILE_NAME} of an earlier run"
    )
    parser.add_argument("--resume", action="store_true", help="resume the interrupted search for this --output")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an older result, or discard an interrupted search"
    )
    parser.add_argument("--no-export", action="store_true", help="choose, measure and plot, but write no checkpoint")
    parser.add_argument("--samples", type=int, help="windows to calibrate on (default: 128)")
    parser.add_argument(
        "--score-samples", type=int, help="of these windows, the number to score (default: 32, or the recipe's)"
    )
    parser.add_argument("--sequence-length", type=int, help="text tokens per window (default: 512)")
    parser.add_argument("--seed", type=int, help="which windows are taken from longer data (default: 0)")
    parser.add_argument(
        "--loss-scale",
        type=float,
        help="factor of the loss under which gradients do not vanish (default: found on the first window)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run (default: cuda where there is a GPU)")


def run(args: argparse.Namespace) -> AutoQuantized | None:
    """Search, or solve new targets from a state; None in every process but the first. Raises ModelOptExtError for bad input."""
    from sglang_modelopt_ext.workflow.common.processes import joined

    with joined(args.device) as (processes, device):
        _check(args, processes.world)
        return _run(args, device, processes)


def _run(args: argparse.Namespace, device: str, processes: Processes) -> AutoQuantized | None:
    from sglang_modelopt_ext.workflow.autoquant.request import Request, Texts
    from sglang_modelopt_ext.workflow.autoquant.run import export_again, measure_times, search, solve_again

    targets = (*map(Target, args.targets), *(Target(us, "us") for us in args.latencies))
    if args.from_state is not None and args.output is None:
        return AutoQuantized(output=None, report=solve_again(args.from_state, targets, args.kv_bits))
    texts = {name: getattr(args, name) for name in ("samples", "score_samples", "sequence_length", "seed")}
    request = Request(
        model=args.model,
        targets=targets,
        output=args.output or Path(),
        formats=_names(args.formats),
        texts=Texts(
            data=tuple(args.data or ()),
            held_out=tuple(args.held_out or ()),
            **{name: value for name, value in texts.items() if value is not None},
        ),
        recipe=args.recipe,
        method=args.method or "gradient",
        gpu=None if args.gpu is None else Device.parse(args.gpu),
        lm_head=args.lm_head or "excluded",
        excluded=tuple(args.exclude or ()),
        loss_scale=args.loss_scale,
        device=device,
        times=_times(args),
        scored_as=args.scored_as or "simulation",
        kv_formats=_names(args.kv_formats),
        kv_target=args.kv_bits,
        export=not args.no_export,
        resume=args.resume,
        overwrite=args.overwrite,
    )
    if args.measure_only:
        return AutoQuantized(output=None, report=None, times=str(measure_times(request)))
    if args.from_state is None:
        report = search(request, processes)
    else:
        report = export_again(args.from_state, request, processes)
    if report is None:
        return None
    return AutoQuantized(output=str(args.output), report=report, times=_text(args.latency_table))


def _names(given: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (given or "").split(",") if name.strip())


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _times(args: argparse.Namespace) -> Table | None:
    """Return where times are read and, on a GPU, measured."""
    if args.latency_table is None:
        return None

    from sglang_modelopt_ext.workflow.autoquant.latency import Table

    def measure(products: Sequence[Product], dtype: torch.dtype, tokens: Sequence[int]) -> TuningFile:
        from sglang_modelopt_ext.tuning.products import tune_products

        return tune_products(products, dtype, tokens, report=lambda line: print(line, file=sys.stderr, flush=True))

    is_gpu = Device.here().kind == "cuda"
    return Table(file=args.latency_table, tokens=args.latency_tokens or 1, measure=measure if is_gpu else None)


def _check(args: argparse.Namespace, world: int) -> None:
    alone = {"--measure-only": args.measure_only, "--from-state without --output": args.from_state and not args.output}
    for words in (words for words, given in alone.items() if given and world > 1):
        expected = f"one process for {words}, which has no work to share"
        raise ModelOptExtError.at("torchrun", "--nproc-per-node", expected, world)
    for flag, targets in ((FLAGS["bits"], args.targets), (FLAGS["us"], args.latencies)):
        for target in targets:
            if not 0 < target < float("inf"):
                raise ModelOptExtError.at(flag, f"{target:g}", "a positive number", f"{target:g}")
        if len(set(targets)) != len(targets):
            raise ModelOptExtError.at(flag, "targets", "each of them once", targets)
    _check_times(args)
    if args.loss_scale is not None and not 0 < args.loss_scale < float("inf"):
        raise ModelOptExtError.at("--loss-scale", "value", "a positive number", args.loss_scale)
    if args.score_samples is not None and args.score_samples < 1:
        raise ModelOptExtError.at("--score-samples", "value", "1 or more", args.score_samples)
    if args.from_state is None:
        _check_search(args)
        return
    if not args.targets and not args.latencies:
        raise ModelOptExtError.at("command line", "--bits", "a value", "none")
    for name in _FIXED:
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ModelOptExtError.at(
                "command line", flag, "no such flag beside --from-state, which has its own", "one"
            )
    if args.resume:
        raise ModelOptExtError.at("command line", "--resume", "no such flag beside --from-state", "one")
    if args.output is not None and args.model is None:
        raise ModelOptExtError.at("command line", "MODEL", "the model, which --output needs", "none")
    if args.output is None and (args.model or args.data or args.held_out or args.no_export):
        raise ModelOptExtError.at("command line", "--output", "a folder, for measuring or exporting the choice", "none")


def _check_times(args: argparse.Namespace) -> None:
    if args.latency_tokens is not None and args.latency_tokens < 1:
        raise ModelOptExtError.at("--latency-tokens", "value", "1 or more", args.latency_tokens)
    searching = {"--bits": args.targets, FLAGS["us"]: args.latencies, "--data": args.data, "--output": args.output}
    for flag, given in searching.items() if args.measure_only else ():
        if given:
            raise ModelOptExtError.at(
                "command line", flag, "no such option beside --measure-only, which ends there", "one"
            )
    if args.latency_table is None:
        for flag, given in (("--latency-tokens", args.latency_tokens), ("--measure-only", args.measure_only)):
            if given:
                raise ModelOptExtError.at("command line", "--latency-table", f"a file, beside {flag}", "none")
        if args.latencies and args.from_state is None:
            expected = (
                "a file of times, made on the GPU that is to serve the result (--measure-only) or read from there"
            )
            raise ModelOptExtError.at("command line", "--latency-table", expected, "none")
    elif not args.latency_table.parent.is_dir():
        raise ModelOptExtError.at(args.latency_table, "folder", "one that exists", "none")


def _check_search(args: argparse.Namespace) -> None:
    needed = {"MODEL": args.model, "--output": args.output, "--data": args.data}
    if args.measure_only:
        needed = {"MODEL": args.model}
    if args.recipe is None:
        needed["--formats"] = args.formats
        if not args.measure_only:
            needed["--bits"] = [*args.targets, *args.latencies]
    for name, value in needed.items():
        if not value:
            raise ModelOptExtError.at("command line", name, "a value: only --from-state does without", "none")
    for name in _OF_RECIPE if args.recipe is not None else ():
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ModelOptExtError.at("command line", flag, "no such flag beside --recipe, which has its own", "one")


COMMAND = Command(
    name="auto-quantize",
    help="Choose a format for every layer within a budget of bits, and quantize the model.",
    add_arguments=add_arguments,
    run=run,
    result=AutoQuantized,
)
