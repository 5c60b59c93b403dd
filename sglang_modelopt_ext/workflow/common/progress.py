"""Progress on standard error: elapsed time for waits of unknown length, a progress bar for polled work."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_NOTE_WIDTH = 70
_TERMINAL_SECONDS, _FILE_SECONDS = 0.5, 15.0


@contextmanager
def elapsed_progress(label: str, enabled: bool = True) -> Iterator[Callable[[str], None]]:
    """Show ``label``, the elapsed time and a note on standard error while the block runs.

    Yields:
        A function that replaces the note shown behind the elapsed time.
    """
    seconds = _TERMINAL_SECONDS if sys.stderr.isatty() else _FILE_SECONDS
    bar = tqdm(
        desc=label, bar_format="{desc} [{elapsed}]{postfix}", leave=True, dynamic_ncols=True, disable=not enabled
    )
    done = threading.Event()

    def tick() -> None:
        while not done.wait(seconds):
            bar.refresh()

    def note(text: str) -> None:
        bar.set_postfix_str(text if len(text) <= _NOTE_WIDTH else text[: _NOTE_WIDTH - 3] + "...", refresh=False)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield note
        note("")
    finally:
        done.set()
        thread.join()
        bar.close()


@contextmanager
def polled_progress(label: str, total: int, done: Callable[[], int], unit: str, enabled: bool = True) -> Iterator[None]:
    """Show a progress bar for work whose progress is polled, with the time left, while the block runs.

    Args:
        label: text in front of the bar.
        total: amount of work.
        done: returns the amount that is done; called from another thread.
        unit: of both amounts.
        enabled: whether to show anything.
    """
    seconds = _TERMINAL_SECONDS if sys.stderr.isatty() else _FILE_SECONDS
    bar = tqdm(desc=label, total=total, unit=unit, dynamic_ncols=True, disable=not enabled)
    ended = threading.Event()

    def show() -> None:
        bar.n = min(done(), total)
        bar.refresh()

    def watch() -> None:
        while not ended.wait(seconds):
            show()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        show()
        bar.close()
