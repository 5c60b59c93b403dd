"""Folders that appear whole: written under a temporary name, locked while they are, and then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.files.disk import full_disk
from sglang_modelopt_ext.files.interrupts import signals_ignored

_PARTIAL = ".partial-"


def check_space(output: Path, needed: int) -> None:
    """Raise ModelOptExtError unless the file system of ``output`` has ``needed`` bytes free."""
    folder = next(parent for parent in output.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelOptExtError.at(folder, "space on disk", f"{needed / 1e6:.1f} MB free", f"{free / 1e6:.1f} MB")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder that may not exist yet while the block runs: one process makes it, others wait."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise ModelOptExtError.at(folder.parent, "folder", "one that can be written to", error) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``output``, removed at the end of the block unless it was renamed.

    It is locked for the life of the process, so that the next run for the same output can recognize, and remove, the
    folder of a killed run.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output.name}{_PARTIAL}"
    _remove_stale(output.parent, prefix)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
    except OSError as error:
        raise ModelOptExtError.at(output.parent, "output", "a folder that can be written to", error) from error
    lock = os.open(scratch, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield scratch
    except ModelOptExtError:
        raise
    except Exception as error:
        full = full_disk(output.parent, error)
        if full is not None:
            raise full from error
        raise
    finally:
        with signals_ignored():
            os.close(lock)
            shutil.rmtree(scratch, ignore_errors=True)


def _remove_stale(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def make_readable(folder: Path, files: Collection[Path] | None = None) -> None:
    """Give the folder and its files the permissions of new ones; temporary ones are private.

    Args:
        folder: the folder.
        files: the files and folders in it to change, by default all. A hard link must not be: it shares them with its source.
    """
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.rglob("*") if files is None else files:
        file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)


def move_into_place(scratch: Path, output: Path) -> None:
    """Rename ``scratch`` to ``output``, and remove an old ``output``.

    Where the file system can exchange two names, there is a whole ``output`` at any moment; elsewhere a kill between two renames
    leaves the old one under a hidden name beside it.
    """
    with signals_ignored():
        if not os.path.lexists(output):
            scratch.rename(output)
            return
        if _exchange(scratch, output):
            shutil.rmtree(scratch, ignore_errors=True)
            return
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.parent)) / output.name
        output.rename(old)
        try:
            scratch.rename(output)
        except OSError:
            old.rename(output)
            raise
        finally:
            shutil.rmtree(old.parent, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step (``renameat2``); return False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
