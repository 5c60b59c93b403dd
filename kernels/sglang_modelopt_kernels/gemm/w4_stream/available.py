"""Whether the installed Triton has what the kernel is written in."""

from __future__ import annotations

import functools

import triton

NEEDED = (3, 8)
"""Triton's version with the Gluon that the kernel was run with; earlier ones name some of it differently."""


@functools.cache
def missing() -> str | None:
    """Return what the kernel needs and the installed Triton lacks, in one phrase, or None."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version >= NEEDED:
        return None
    return f"needs Triton {'.'.join(map(str, NEEDED))}, not {triton.__version__}"
