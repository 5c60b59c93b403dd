"""The versions of SGLang: those this plugin was tested with, and the one that is installed, which is not imported."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

TESTED_SGLANG = ("0.5.22", "0.5.23")
"""The tested versions of SGLang, oldest first. ``make test-full`` runs the older ones in environments of their own."""


@functools.cache
def installed_sglang() -> str | None:
    """Return the version of the installed SGLang without a local part such as ``+cu130``, None where there is none."""
    try:
        return version("sglang").partition("+")[0]
    except PackageNotFoundError:
        return None


def described_sglang() -> str:
    """Return the tested version by which SGLang's own behaviour is judged: the installed one, else the newest."""
    found = installed_sglang()
    return found if found in TESTED_SGLANG else TESTED_SGLANG[-1]
