"""The device that a server runs on: by its arguments before it starts, and in each of its processes afterwards."""

from __future__ import annotations

import os
from typing import Any

from sglang_modelopt_ext.device import Device

_settled: Device | None = None
"""That of the server whose arguments this process resolved; None in the processes that server starts."""


def device_of(server_args: Any) -> Device:
    """Return the device of a server with these arguments, as SGLang settles ``--device``: the user's, or the machine's own.

    An NVIDIA GPU that is asked for and not there is SGLang's to report.
    """
    named = str(server_args.device or "").partition(":")[0]
    if not named and os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        named = "cpu"
    return Device.here() if named in ("", "cuda") else Device.of(named)


def settle(server_args: Any) -> Device:
    """Return :func:`device_of` and remember it for this process, where SGLang has not published the arguments yet."""
    global _settled
    _settled = device_of(server_args)
    return _settled


def server_device() -> Device:
    """Return the device of the server that this process belongs to; this machine's in a process of no server."""
    from sglang.srt.runtime_context import get_server_args

    if _settled is not None:
        return _settled
    try:
        return device_of(get_server_args())
    except ValueError:  # none were published
        return Device.here()
