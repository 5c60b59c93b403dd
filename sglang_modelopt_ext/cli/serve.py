"""``sglang-modelopt serve``: quantize a model unless that was done before, and run the stock server on the result."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import msgspec

from sglang_modelopt_ext.cli.command import Command, Result
from sglang_modelopt_ext.cli.quantize import add_recipe_arguments, options
from sglang_modelopt_ext.workflow.common.served_speed import advice_here
from sglang_modelopt_ext.workflow.serve import DEFAULT_CACHE, Launch, prepare


class ServeResult(Result, frozen=True, kw_only=True):
    """The checkpoint and the command that serves it.

    Attributes:
        folder: the checkpoint.
        cached: whether an earlier command had made the checkpoint.
        command: the server's command.
        environment: variables the server needs besides those that are set.
    """

    folder: str
    cached: bool
    command: tuple[str, ...]
    environment: dict[str, str]

    def text(self) -> str:
        """Return the command in shell syntax."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "sglang-modelopt serve MODEL --recipe NAME [options] [-- arguments of the server]"
    parser.add_argument("model", help="folder or Hugging Face name of the unquantized model")
    add_recipe_arguments(parser)
    parser.add_argument(
        "--cache-dir", type=Path, default=DEFAULT_CACHE, help="folder of the cached checkpoints (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="quantize and print the command, but start no server")


def _result(launch: Launch) -> ServeResult:
    return ServeResult(
        folder=str(launch.folder), cached=launch.cached, command=launch.command, environment=launch.environment
    )


def _run(args: argparse.Namespace) -> Result:
    line = advice_here()
    if line is not None:
        print(line, file=sys.stderr, flush=True)
    launch = prepare(args.model, options(args), args.cache_dir, args.rest)
    result = _result(launch)
    if args.dry_run:
        return result
    # The server replaces this process; nothing is printed after it.
    print(msgspec.json.encode(result).decode() if args.json else result.text(), flush=True)
    sys.stderr.flush()
    launch.run()
    return result


COMMAND = Command(
    "serve",
    "Quantize a model unless that was done before, and serve it with SGLang.",
    _add_arguments,
    _run,
    ServeResult,
    takes_rest=True,
)
