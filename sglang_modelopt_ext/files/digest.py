"""Digests of the content of files and folders, cached until a file changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sglang_modelopt_ext.errors import ModelOptExtError

_BLOCK = 1 << 22
_MEMORY = "digests.json"
_READERS = 8


def folder_digest(folder: Path, patterns: Iterable[str], memory: Path | None = None) -> str:
    """Return the sha256 over the names and contents of a folder's files that match the patterns.

    Args:
        folder: the folder; its subfolders are not searched.
        patterns: of file names.
        memory: a folder that caches digests by path, size and modification time; None reads every file.

    Raises:
        ModelOptExtError: a file that cannot be read.
    """
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    known = _recall(memory)
    keys = {file: _state_of(file) for file in files}
    unread = [file for file in files if keys[file] not in known]
    # hashlib computes outside of Python's lock: files of a large model are read side by side.
    with ThreadPoolExecutor(_READERS) as pool:
        known.update(zip((keys[file] for file in unread), pool.map(_readable_digest, unread), strict=True))
    digests = {file.name: known[keys[file]] for file in files}
    _remember(memory, known)
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _state_of(file: Path) -> str:
    """Return what changes when a file does."""
    status = file.stat()
    return f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"


def _readable_digest(file: Path) -> str:
    try:
        return file_digest(file)
    except OSError as error:
        raise ModelOptExtError.at(file, "file", "a readable one", error) from error


def file_digest(file: Path) -> str:
    """Return the sha256 of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _recall(memory: Path | None) -> dict[str, str]:
    known: dict[str, str] = {}
    if memory is not None:
        with contextlib.suppress(OSError, ValueError):
            known = dict(json.loads((memory / _MEMORY).read_text(encoding="utf-8")))
    return known


def _remember(memory: Path | None, known: dict[str, str]) -> None:
    if memory is None:
        return
    temporary = memory / f"{_MEMORY}.{os.getpid()}"
    with contextlib.suppress(
        OSError
    ):  # a folder without room or that cannot be written to: files are read again next time
        memory.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known), encoding="utf-8")
        temporary.replace(memory / _MEMORY)
