"""Starting a command and ending everything that came from it."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

KILL_SECONDS = 6.0
MARK = "TEST_PROCESS_MARK"


class ProcessTree:
    """All processes that come from one command, also after some of them were orphaned or renamed themselves.

    They carry a mark in their environment, and they are in the session of the first. Neither is enough: the scheduler
    loses its environment when it changes its title, and a process may open a session of its own.
    """

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self._session: int | None = None

    def start(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Starts the first process; its output and that of its children goes to the file ``log``."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**env, MARK: self.mark},
                start_new_session=True,
            )
        self._session = process.pid
        return process

    def living(self) -> list[psutil.Process]:
        """Those that still run."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def describe(self) -> tuple[str, ...]:
        """Those that still run, in words."""
        return tuple(f"{process.pid}: {' '.join(_command_line(process))[:200]}" for process in self.living())

    def kill(self) -> tuple[str, ...]:
        """Kills all, again until none is left, and removes the shared memory they had mapped.

        The resource tracker of multiprocessing goes last and by itself: it removes the semaphores. SGLang never removes
        its ``/dev/shm/sglang_loads_*``, however it is stopped.

        Returns:
            Those that could not be killed.
        """
        shared: set[str] = set()
        deadline = time.monotonic() + KILL_SECONDS
        while (living := self.living()) and time.monotonic() < deadline:
            # All of them before the first is killed: the scheduler dies with its parent.
            shared = shared.union(*(_shared_memory(process) for process in living))
            others = [process for process in living if not _is_tracker(process)]
            for process in others or (living if time.monotonic() > deadline - KILL_SECONDS / 2 else []):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(living, timeout=0.1)
        for path in shared:
            Path(path).unlink(missing_ok=True)
        return self.describe()

    def _owns(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return os.getsid(process.pid) == self._session or process.environ().get(MARK) == self.mark
        except (psutil.Error, OSError):
            return False


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _is_tracker(process: psutil.Process) -> bool:
    return "multiprocessing.resource_tracker" in " ".join(_command_line(process))


def _shared_memory(process: psutil.Process) -> set[str]:
    """The files under /dev/shm that a process has mapped."""
    try:
        maps = Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return set()
    return {line.split()[-1] for line in maps.splitlines() if "/dev/shm/" in line and "(deleted)" not in line}
