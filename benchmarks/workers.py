"""Processes that do one job at a time and may die of it: compilers abort, and kernels leave a GPU's context unusable."""

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
    """Calls of ``function``, which is importable, in processes that are kept; one that dies is replaced.

    Args:
        function: takes a job, returns what can be pickled.
        count: processes at a time.
        dead: what is returned for a job that ended its process.
    """

    def __init__(self, function: Callable[[Any], Any], count: int, dead: Any) -> None:
        self._function, self._dead = function, dead
        self._context = multiprocessing.get_context("spawn")
        self._pool = ThreadPoolExecutor(count)
        self._own = threading.local()
        self._started: list[tuple[Any, Connection]] = []

    def _connection(self) -> Connection:
        """To this thread's process, which is started where there is none."""
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
        """What came of each job, None where it was not begun before ``deadline`` (``time.monotonic``)."""
        results = self._pool.map(lambda job: self._do(job, deadline), jobs)
        return dict(zip(jobs, results, strict=True))

    def close(self) -> None:
        """Ends the processes."""
        self._pool.shutdown()
        for process, connection in self._started:
            connection.close()
            process.join(5)
            if process.is_alive():
                process.terminate()
