"""The exception of this package, and the form of its message."""

from __future__ import annotations


class ModelOptExtError(ValueError):
    """A checkpoint, a flag or a combination of both that cannot be served correctly.

    The message is always one line, ``<file>: <tensor or field>: expected <what>, got <what>``, so that it can be shown without
    a traceback and searched for in a log.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    @classmethod
    def at(cls, where: object, subject: str, expected: str, got: object) -> ModelOptExtError:
        """Return the error for ``subject`` (a tensor, field or flag) of ``where`` (a file, folder, layer or the command line)."""
        return cls(f"{where}: {subject}: expected {expected}, got {got}")

    def one_line(self) -> str:
        """Return the line that is printed: ``ModelOptExtError: <message>``."""
        return f"{type(self).__name__}: {self}"
