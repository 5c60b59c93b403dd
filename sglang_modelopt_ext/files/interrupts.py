"""Signals that ask a process to stop: raised as KeyboardInterrupt, or ignored during cleanup."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ASKED_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP too while the block runs. Ignored signals (nohup) stay ignored."""
    with _handlers(_interrupt):
        yield


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignore SIGINT, SIGTERM and SIGHUP while the block runs, so that cleanup completes."""
    with _handlers(signal.SIG_IGN):
        yield


@contextmanager
def _handlers(handler: object) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    previous = {number: signal.getsignal(number) for number in ASKED_TO_STOP}
    for number, old in previous.items():
        if old not in (signal.SIG_IGN, None):
            signal.signal(number, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in previous.items():
            if old not in (signal.SIG_IGN, None):
                signal.signal(number, old)
