"""The exception of this package, and the form of its message."""

from __future__ import annotations

LONGEST = 10_000
"""Characters of a message; the longest real ones list what a version of SGLang lacks."""


def printable(text: str) -> str:
    """Return ``text`` with the characters escaped that a terminal would obey, or cannot be given; line breaks stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


class ModelOptExtError(ValueError):
    """A checkpoint, a flag or a combination of both that cannot be served correctly.

    The message is always one line, ``<file>: <tensor or field>: expected <what>, got <what>``, so that it can be shown without
    a traceback and searched for in a log. It quotes names of files and tensors that others chose: characters that a terminal would
    obey, or cannot be given, are escaped, and the end of a very long line is left out.
    """

    def __init__(self, message: str) -> None:
        line = printable(" ".join(message[: 2 * LONGEST].split()))
        super().__init__(line if len(line) <= LONGEST else line[:LONGEST] + " ...")

    @classmethod
    def at(cls, where: object, subject: str, expected: str, got: object) -> ModelOptExtError:
        """Return the error for ``subject`` (a tensor, field or flag) of ``where`` (a file, folder, layer or the command line)."""
        return cls(f"{where}: {subject}: expected {expected}, got {got}")

    def one_line(self) -> str:
        """Return the line that is printed: ``ModelOptExtError: <message>``."""
        return f"{type(self).__name__}: {self}"
