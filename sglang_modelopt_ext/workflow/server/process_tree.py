"""A command and every process that comes from it, ended together."""

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


class ProcessTree:
    """All processes that descend from one command, including orphans and processes that renamed themselves.

    They carry a variable in their environment, and they are in the session of the first. Neither is enough: SGLang's
    scheduler loses its environment when it changes its title, and a process may open a session of its own.
    """

    def __init__(self) -> None:
        # A name of its own for each tree: a tree may run inside another, and both must find its processes.
        self._mark = f"PROCESS_TREE_{uuid.uuid4().hex}"
        self._session: int | None = None

    def start(
        self, command: Sequence[str], env: Mapping[str, str], log: Path, *, stderr: int | None = subprocess.STDOUT
    ) -> subprocess.Popen[bytes]:
        """Start the first process in a session of its own and return at once.

        Args:
            command: the program and its arguments.
            env: all environment variables.
            log: file that receives standard output; replaced.
            stderr: destination of standard error, as in :class:`subprocess.Popen`; None: the terminal.
        """
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=stderr,
                env={**env, self._mark: "1"},
                start_new_session=True,
            )
        self._session = process.pid
        return process

    def living(self) -> list[psutil.Process]:
        """Return the processes that still run."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def describe(self) -> tuple[str, ...]:
        """Return the process id and command line of each process that still runs."""
        return tuple(f"{process.pid}: {' '.join(_command_line(process))[:200]}" for process in self.living())

    def kill(self) -> tuple[str, ...]:
        """Kill all processes, repeatedly until none is left, and remove the shared memory they had mapped.

        The resource tracker of multiprocessing is killed last, because it removes the semaphores. SGLang never removes
        its ``/dev/shm/sglang_loads_*``, however it is stopped.

        Returns:
            Descriptions of the processes that could not be killed.
        """
        shared: set[str] = set()
        deadline = time.monotonic() + KILL_SECONDS
        while (living := self.living()) and time.monotonic() < deadline:
            # Read the mappings of all before the first is killed: the scheduler dies with its parent.
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
            return os.getsid(process.pid) == self._session or self._mark in process.environ()
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
    """Return the files under /dev/shm that a process has mapped."""
    try:
        maps = Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return set()
    return {line.split()[-1] for line in maps.splitlines() if "/dev/shm/" in line and "(deleted)" not in line}
