"""Worker processes that a job may kill: compilers abort, and kernels leave a CUDA context unusable."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Job = TypeVar("Job", bound=Hashable)


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(function(job))


class Workers:
    """Pool of processes that call ``function``; one that dies is replaced.

    Args:
        function: importable; takes a job and returns a picklable result.
        count: number of processes.
        dead: the result of a job that ended its process.
    """

    def __init__(self, function: Callable[[Any], Any], count: int, dead: Any) -> None:
        self._function, self._dead = function, dead
        self._context = multiprocessing.get_context("spawn")
        self._pool = ThreadPoolExecutor(count)
        self._own = threading.local()
        self._started: list[tuple[Any, Connection]] = []

    def _connection(self) -> Connection:
        """Return the connection to this thread's process, started where there is none."""
        if getattr(self._own, "connection", None) is None:
            self._own.connection, other = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(other, self._function), daemon=True)
            process.start()
            other.close()
            self._started.append((process, self._own.connection))
        connection: Connection = self._own.connection
        return connection

    def _do(self, job: Any, deadline: float) -> Any:
        if time.monotonic() > deadline:
            return None
        connection = self._connection()
        try:
            connection.send(job)
            return connection.recv()
        except (EOFError, OSError):
            self._own.connection = None
            return self._dead

    def map(self, jobs: Sequence[Job], deadline: float) -> dict[Job, Any]:
        """Return the result of each job; None for one that was not begun before ``deadline`` (``time.monotonic``)."""
        results = self._pool.map(lambda job: self._do(job, deadline), jobs)
        return dict(zip(jobs, results, strict=True))

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown()
        for process, connection in self._started:
            connection.close()
            process.join(5)
            if process.is_alive():
                process.terminate()
