"""``sglang-modelopt bench``: the speed of SGLang servers, recipe beside recipe."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from sglang_modelopt_ext.cli.command import Command, Result
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.bench import report, server
from sglang_modelopt_ext.workflow.bench.load import Plan
from sglang_modelopt_ext.workflow.bench.models import SHAPES
from sglang_modelopt_ext.workflow.bench.options import RECIPES, VARIANTS
from sglang_modelopt_ext.workflow.bench.run import Request, run

CACHE = Path("~/.cache/sglang-modelopt/bench")
"""Where models and logs go by default."""


class BenchResult(Result, frozen=True, kw_only=True):
    """The figures of every server.

    Attributes:
        run: where and how they were measured.
        results: of each option.
    """

    run: report.Run
    results: list[server.Result]

    def passed(self) -> bool:
        """Return whether everything was measured."""
        return not any(result.problems for result in self.results)

    def text(self) -> str:
        """Return the table, what was not measured, and the profiles."""
        return report.as_text(self.run, self.results)


def parse_long(text: str) -> tuple[int, int]:
    """Read ``NxTOKENS``."""
    count, _, tokens = text.partition("x")
    return int(count), int(tokens)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    plan = Plan()
    parser.usage = "sglang-modelopt bench OPTION [OPTION ...] [options] [-- arguments of every server]"
    parser.description = (
        "Measure the speed of SGLang servers, one after another: start, memory, time to the first token, decode rates, long "
        "prompts, and with --profile the kernels of a decode step. An option is a checkpoint's folder, or a recipe that is served "
        "from a model of --shape with random weights. docs/benchmarks.md defines the figures."
    )
    parser.add_argument(
        "options",
        nargs="+",
        metavar="OPTION",
        help=f"{', '.join(RECIPES)} or a folder, and variants: {', '.join('+' + name for name in VARIANTS)}",
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="sizes of the models of recipes (default: 8b)")
    parser.add_argument(
        "--models", type=Path, default=CACHE / "models", help="folder that keeps these models (default: %(default)s)"
    )
    parser.add_argument("--baseline", help="the option that ratios refer to (default: the first)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="end after this time with what is known then")
    parser.add_argument(
        "--together",
        action="store_true",
        help="start all servers before the first is measured; bound their caches with -- --max-total-tokens N",
    )
    parser.add_argument(
        "--dummy",
        action="store_true",
        help="write no weights, servers draw their own (--load-format dummy): for models larger than the disk, not for mixtures",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page in Markdown")
    parser.add_argument("--results", type=Path, metavar="FILE", help="write JSON, after each option")
    parser.add_argument(
        "--logs", type=Path, default=CACHE / "logs", help="servers' logs and traces (default: %(default)s)"
    )
    parser.add_argument(
        "--profile", type=int, nargs="?", const=1, metavar="N", help="profile a decode step of N requests (default: 1)"
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--first-token",
        type=int,
        nargs="*",
        default=plan.first_token,
        metavar="TOKENS",
        help="lengths of prompts whose time to the first token is measured",
    )
    load.add_argument(
        "--concurrency", type=int, nargs="*", default=plan.concurrency, metavar="N", help="requests decoded together"
    )
    load.add_argument(
        "--prompt", type=int, default=plan.prompt, metavar="TOKENS", help="of their prompts (default: %(default)s)"
    )
    load.add_argument(
        "--output", type=int, default=plan.output, metavar="TOKENS", help="of their answers (default: %(default)s)"
    )
    load.add_argument(
        "--long", type=parse_long, nargs="*", default=plan.long, metavar="NxTOKENS", help="requests and their prompts"
    )
    load.add_argument(
        "--long-output", type=int, default=plan.long_output, metavar="TOKENS", help="of theirs (default: %(default)s)"
    )
    load.add_argument(
        "--repeats", type=int, default=plan.repeats, metavar="N", help="the median counts (default: %(default)s)"
    )
    load.add_argument(
        "--step-seconds", type=float, default=plan.step_seconds, help="limit for one measurement (default: %(default)s)"
    )
    load.add_argument("--seed", type=int, default=plan.seed, help="of the prompts (default: %(default)s)")


def _plan(args: argparse.Namespace) -> Plan:
    names = ("first_token", "concurrency", "prompt", "output", "long", "long_output", "repeats", "step_seconds", "seed")
    return Plan(**{name: getattr(args, name) for name in names})


def _command(words: Sequence[str]) -> str:
    """Return the command for the report, also where ``python -m benchmarks.serving`` was called."""
    return "sglang-modelopt " + shlex.join(words if words[:1] == [COMMAND.name] else [COMMAND.name, *words])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run(args: argparse.Namespace) -> BenchResult:
    settings = server.Settings(_plan(args), args.rest, args.logs.expanduser(), args.profile, _say)
    request = Request(
        options=args.options,
        settings=settings,
        shape=args.shape,
        models=args.models.expanduser(),
        baseline=args.baseline,
        budget=args.budget,
        together=args.together,
        dummy=args.dummy,
        command=_command(sys.argv[1:]),
        json_file=args.results,
        page=args.report,
    )
    try:
        about, results = run(request)
    except (OSError, BrokenProcessPool) as error:
        raise ModelOptExtError.at("bench", "files and models", "to be written", error) from error
    return BenchResult(run=about, results=results)


COMMAND = Command(
    "bench", "Measure the speed of SGLang servers, recipe beside recipe.", _add_arguments, _run, BenchResult, True
)
