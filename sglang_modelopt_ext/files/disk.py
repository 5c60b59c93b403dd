"""Errors of a disk that is full, however deep other packages bury them."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from sglang_modelopt_ext.errors import ModelOptExtError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_TEXTS = ("No space left on device", "Disk quota exceeded")
_TORCH = ("inline_container", "iostream error")
"""Words of errors of torch while it writes an archive."""

LITTLE = 1 << 20
"""Bytes that may be free on a disk that a file just did not fit on."""


def full_disk(folder: Path, error: BaseException) -> ModelOptExtError | None:
    """Return the error for a full disk where ``error``, or one that it was raised from or after, says so; None otherwise.

    safetensors gives the text only, and torch not even that: its error counts where the disk has no room left.

    Args:
        folder: on that disk.
        error: of any package.
    """
    found: BaseException | None = error
    while found is not None:
        text = str(found)
        by_torch = any(part in text for part in _TORCH) and shutil.disk_usage(folder).free < LITTLE
        if by_torch or getattr(found, "errno", None) in _FULL or any(part in text for part in _TEXTS):
            return ModelOptExtError.at(folder, "space on disk", "room for the checkpoint", found)
        found = found.__cause__ or found.__context__
    return None
