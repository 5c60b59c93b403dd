"""The parts of a subcommand: its arguments, its function, and a result that prints as text or JSON."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

OK, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
"""Exit codes. argparse exits with 2 too."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a subcommand. Its fields are the JSON of ``--json``; ``docs/cli.md`` has their schema."""

    def text(self) -> str:
        """Return the result as text for people."""
        raise NotImplementedError

    def passed(self) -> bool:
        """Return False where the subcommand is a check that failed; the exit code is then 1."""
        return True


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        name: its name on the command line.
        help: its line in the list of subcommands.
        add_arguments: adds its own arguments; every subcommand also has ``--json``.
        run: runs it; None in a process that only shared the work of the one that prints. Raises ModelOptExtError for bad input.
        result: the type that ``run`` returns.
        takes_rest: whether ``run`` takes the arguments after ``--``, as ``args.rest``.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Result | None]
    result: type[Result]
    takes_rest: bool = False
