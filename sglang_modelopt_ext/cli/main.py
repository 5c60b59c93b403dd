"""The console script ``sglang-modelopt``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import msgspec

from sglang_modelopt_ext import __version__
from sglang_modelopt_ext.cli import auto_quantize, bench, evaluate, inspect, quantize, repair, serve, verify
from sglang_modelopt_ext.cli.command import BAD_INPUT, CHECK_FAILED, INTERRUPTED, OK, Command
from sglang_modelopt_ext.errors import ModelOptExtError, printable
from sglang_modelopt_ext.files.interrupts import signals_as_interrupts
from sglang_modelopt_ext.workflow.common.processes import OtherProcessFailed

COMMANDS: tuple[Command, ...] = (
    quantize.COMMAND,
    auto_quantize.COMMAND,
    inspect.COMMAND,
    repair.COMMAND,
    verify.COMMAND,
    evaluate.COMMAND,
    bench.COMMAND,
    serve.COMMAND,
)
"""All subcommands, in the order of a typical workflow."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="sglang-modelopt",
        description="Quantize a model with NVIDIA ModelOpt; check, repair, measure and serve the result with SGLang.",
    )
    parser.add_argument("--version", action="version", version=f"sglang-modelopt-ext {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
        subparser.set_defaults(chosen=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    own, rest = _split(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(own, argparse.Namespace(rest=rest))
    if rest and not args.chosen.takes_rest:
        parser.error(f"{args.command} takes no arguments after --")
    try:
        with signals_as_interrupts():
            result = args.chosen.run(args)
    except OtherProcessFailed:
        return BAD_INPUT
    except ModelOptExtError as error:
        print(error.one_line(), file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    if result is None:
        return OK
    print(
        msgspec.json.format(msgspec.json.encode(result), indent=2).decode() if args.json else printable(result.text())
    )
    return OK if result.passed() else CHECK_FAILED


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before and after the first ``--``."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])
