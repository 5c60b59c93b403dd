"""The versions of the other packages whose kernels are called, and which of them are installed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import metadata

VERSIONS: Mapping[str, str] = {
    "flashinfer-python": "0.7.2",
    "humming-kernels": "0.1.12",
    "quack-kernels": "0.6.5",
}
"""The versions that SGLang 0.5.23 pins. ``tests/unit/test_contracts.py`` checks every call against their sources."""


@functools.cache
def installed() -> Mapping[str, str]:
    """Return the installed versions of the packages in :data:`VERSIONS`, by name, without importing any of them."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def package_objection(name: str, packages: Mapping[str, str]) -> str | None:
    """Return why the kernels of a package cannot be called, or None.

    Args:
        name: the package.
        packages: the installed versions, by name.
    """
    version = packages.get(name)
    if version is None:
        return f"needs {name} {VERSIONS[name]}, which is not installed"
    if version != VERSIONS[name]:
        return f"is written for {name} {VERSIONS[name]}, not {version}"
    return None
