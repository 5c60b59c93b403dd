"""What a subcommand is: its arguments, what it does, and a result that prints as text or as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

OK, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
"""Exit codes. argparse ends with 2 too."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a subcommand found. Its fields are the JSON that ``--json`` prints; ``docs/cli.md`` has their schema."""

    def text(self) -> str:
        """The same for a person to read."""
        raise NotImplementedError

    def passed(self) -> bool:
        """False where the subcommand is a check that failed: then the exit code is 1."""
        return True


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        name: as typed.
        help: one line for the list of subcommands.
        add_arguments: adds its own arguments; ``--json`` is added for every subcommand.
        run: does it. Raises ModelOptExtError for bad input.
        result: the type of what ``run`` returns.
        takes_rest: whether ``run`` wants what stands behind ``--``, as ``args.rest``.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Result]
    result: type[Result]
    takes_rest: bool = False
