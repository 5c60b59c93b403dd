"""Kernels of other packages: which versions the calls are written for, and where these are installed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import metadata

VERSIONS: Mapping[str, str] = {
    "flashinfer-python": "0.7.2",
    "humming-kernels": "0.1.12",
    "quack-kernels": "0.6.5",
}
"""As SGLang 0.5.23 pins them. ``tests/unit/test_contracts.py`` holds every call against the sources of these versions."""


@functools.cache
def installed() -> Mapping[str, str]:
    """The versions of these packages in this environment, without importing any of them."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def package_objection(name: str, packages: Mapping[str, str]) -> str | None:
    """Why ``name`` cannot be called where ``packages`` are installed; None when it can."""
    version = packages.get(name)
    if version is None:
        return f"needs {name} {VERSIONS[name]}, which is not installed"
    if version != VERSIONS[name]:
        return f"is written for {name} {VERSIONS[name]}, not {version}"
    return None
