"""TCP ports for servers and process groups that are started."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 20000
_TRIES = 100


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing uses, where possible one that the kernel gives to no other process by itself.

    A server takes its port only once it has loaded its model. Of the ports that the kernel hands out for connections and sockets
    without a number, another process may have got it by then.
    """
    choose = random.SystemRandom()
    for _ in range(_TRIES if _first_given() > _LOWEST else 0):
        port = choose.randrange(_LOWEST, _first_given())
        if _is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _first_given() -> int:
    """Return the lowest port that the kernel hands out; 0 where it is unknown."""
    try:
        return int(_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
