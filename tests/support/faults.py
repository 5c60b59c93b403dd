"""Faults around a function that writes files: a kill at any of its changes to a folder, and a disk that is full.

The changes are counted by Python's audit events. A process that is ended at one of them does not flush its files: what it wrote
last may be missing, as after a kill.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

KILLED = 137
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = frozenset(
    {
        "os.rename",
        "os.remove",
        "os.mkdir",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.chmod",
        "shutil.rmtree",
    }
)


def _paths(arguments: tuple[Any, ...]) -> list[str]:
    return [os.fsdecode(word) for word in arguments if isinstance(word, (str, bytes, os.PathLike))]


def _is_change(event: str, arguments: tuple[Any, ...], root: str) -> bool:
    if event == "open":
        path, mode, flags = arguments
        writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & _WRITING)
        return writes and _inside(_paths((path,)), root)
    return event in _CHANGES and _inside(_paths(arguments), root)


def _inside(paths: list[str], root: str) -> bool:
    return any(str(Path(path).absolute()).startswith(root + os.sep) for path in paths)


def killed_at(change: int, function: Callable[[], object], root: Path) -> int:
    """Run a function in a copy of this process that ends before its change number ``change`` to a file under ``root``.

    Returns:
        The exit code: :data:`KILLED`, 0 where there are fewer changes, 1 where it raised an exception, which is printed.
    """
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    seen, place = 0, str(root.absolute())

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if _is_change(event, arguments, place):
            seen += 1
            if seen > change:
                os._exit(KILLED)

    code = 1
    try:
        sys.addaudithook(watch)
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def count_changes(function: Callable[[], object], root: Path) -> int:
    """Run a function in this process; return how many changes it makes to files under ``root``."""
    seen, counting, place = 0, True, str(root.absolute())

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if counting and _is_change(event, arguments, place):
            seen += 1

    sys.addaudithook(watch)
    try:
        function()
    finally:
        counting = False  # a hook stays for the life of the process
    return seen


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """Mount a disk of that size on an empty folder; yield a function that changes its size. Skip the test where it cannot be."""
    folder.mkdir(exist_ok=True)

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)

    try:
        mount(f"size={kilobytes}k")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted: {error}")
    try:
        yield lambda size: mount(f"remount,size={size}k")
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False)
