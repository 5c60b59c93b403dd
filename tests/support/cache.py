"""Folders that are slow to make, made once: keyed by what they depend on, and safe for concurrent processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ENVIRONMENT = "SGLANG_MODELOPT_EXT_EXPORT_CACHE"
REPOSITORY = Path(__file__).resolve().parents[2]


def cache_root() -> Path:
    """The cache folder: ``$SGLANG_MODELOPT_EXT_EXPORT_CACHE``, else ``.export-cache`` in the repository."""
    return Path(os.environ.get(ENVIRONMENT) or REPOSITORY / ".export-cache").resolve()


def cached_folder(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """``<cache>/<kind>/<name>``, filled by ``make(folder)`` when it is not there yet.

    It is made in a temporary folder next to it and renamed, so that nobody ever sees a half-written one. Of two
    processes that make the same folder, the one that comes second drops its own.
    """
    target = cache_root() / kind / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        scratch.chmod(0o755)
        make(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch use one thread: on a busy machine two of them wait for each other, up to thirty times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def digest(*values: Any) -> str:
    """A short hash of JSON-like values; the order of a dictionary counts, and its keys may be of any type."""
    text = json.dumps(values, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def source_digest(*files: Path) -> str:
    """A hash of source files: what an older version of them made is not taken from the cache."""
    return digest(*(file.read_text(encoding="utf-8") for file in files))


def folder_digest(folder: Path) -> str:
    """A hash of the names and the bytes of all files of a folder."""
    result = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        result.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        result.update(path.read_bytes())
    return result.hexdigest()[:16]
