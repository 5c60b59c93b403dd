"""Cached folders that are slow to make: keyed by their inputs, and safe for concurrent processes."""

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
    """Return the cache folder: ``$SGLANG_MODELOPT_EXT_EXPORT_CACHE``, else ``.export-cache`` in the repository."""
    return Path(os.environ.get(ENVIRONMENT) or REPOSITORY / ".export-cache").resolve()


def cached_folder(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """Return ``<cache>/<kind>/<name>``, filled by ``make(folder)`` when it is not there yet.

    It is made in a temporary folder next to it and renamed, so that no process sees a half-written one. Of two
    processes that make the same folder, the second discards its own.
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
    """Limit torch to one thread while the block runs: on a busy machine two wait for each other, up to 30 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def digest(*values: Any) -> str:
    """Return a short hash of JSON-like values; the order of a dictionary matters, and its keys may be of any type."""
    text = json.dumps(values, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def source_digest(*files: Path) -> str:
    """Return a hash of source files, so that results of older versions are not taken from the cache."""
    return digest(*(file.read_text(encoding="utf-8") for file in files))


def folder_digest(folder: Path) -> str:
    """Return a hash of the names and the bytes of all files of a folder."""
    result = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        result.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        result.update(path.read_bytes())
    return result.hexdigest()[:16]
