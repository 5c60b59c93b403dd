"""``sglang-modelopt`` with one process of several that fails at a window: ``FAIL=RANK:PHASE:WINDOW:HOW``, started by torchrun."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from sglang_modelopt_ext.cli.main import main
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant import search

ERROR = "window: expected one to score, got a fault of the test"


def fail_in(phase: str, number: int, how: str) -> None:
    """Make the search fail at its window ``number``, from 1 on, of those that are scored or that it calibrates on.

    Args:
        phase: ``score`` or ``calibrate``.
        number: of the window among those of this process.
        how: ``error``, ``interrupt``, or ``kill``.
    """
    forward, seen = search.Search._forward, [0]

    def failing(self: search.Search, model: Any, batch: Any) -> Any:
        if self.in_scoring == (phase == "score"):
            seen[0] += 1
            if seen[0] == number and how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if seen[0] == number:
                raise KeyboardInterrupt if how == "interrupt" else ModelOptExtError(ERROR)
        return forward(self, model, batch)

    search.Search._forward = failing  # type: ignore[method-assign]
    search.SAVE_SECONDS = 0.0


if __name__ == "__main__":
    rank, phase, number, how = os.environ["FAIL"].split(":")
    if os.environ["RANK"] == rank:
        fail_in(phase, int(number), how)
    search.SAVE_SECONDS = 0.0
    sys.exit(main(sys.argv[1:]))
