"""The real SGLang server as a context manager: started, waited for with visible progress, and gone afterwards."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil
import torch

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common.progress import ticking
from sglang_modelopt_ext.workflow.server.client import ServerClient, open_url

TAIL_LINES = 20
_POLL_SECONDS = 0.5
_STOP_SECONDS = 10.0
_TAIL_BYTES = 32_768
_LOG_LINE = re.compile(r"\[\d{4}-\d\d-\d\d [^]]*\] (?!.*GET /health)(.*)")
_OUR_ERROR = re.compile(rf"{ModelOptExtError.__name__}: (.+)")


def cpu_arguments(max_total_tokens: int = 8192) -> dict[str, str]:
    """What the server has to be told where there is no GPU."""
    return {
        "--device": "cpu",
        "--attention-backend": "torch_native",
        "--max-total-tokens": str(max_total_tokens),
    }


def cpu_environment() -> dict[str, str]:
    """The variables the server needs where there is no GPU."""
    return {"SGLANG_USE_CPU_ENGINE": "1"}


class ServerProcess(ServerClient):
    """``python -m sglang.launch_server`` in a session of its own, ready when the ``with`` block begins.

    On leaving the block, also by an exception or Ctrl-C, every process of that session is ended.

    Args:
        model: the checkpoint's folder.
        log: the file that receives everything the server prints; replaced.
        quantization: the ``--quantization`` flag, None to leave it out.
        arguments: further command-line arguments of the server.
        environment: variables to set; None as a value removes one.
        max_total_tokens: size of the KV cache on a CPU, where SGLang would otherwise take most of the memory.
        timeout: seconds the server may take to start.
        progress: whether to show a progress line while waiting.
    """

    def __init__(
        self,
        model: Path,
        *,
        log: Path,
        quantization: str | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str | None] | None = None,
        max_total_tokens: int = 8192,
        timeout: float = 600.0,
        progress: bool = True,
    ) -> None:
        self.port = _free_port()
        super().__init__(f"http://127.0.0.1:{self.port}", model, timeout)
        self.log = log
        self.progress = progress
        self.on_cpu = not torch.cuda.is_available()
        self.command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port)]
        if quantization is not None:
            self.command += ["--quantization", quantization]
        if self.on_cpu:
            for name, value in cpu_arguments(max_total_tokens).items():
                self.command += [name, value]
        self.command += arguments
        self.environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: str | None = None

    def __enter__(self) -> ServerProcess:
        try:
            self._start()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def session(self) -> int:
        """The session, and the first process, of the running server."""
        if self._process is None:
            raise ModelOptExtError.at(self.log, "server", "it to be running", "a stopped one")
        return self._process.pid

    def _start(self) -> None:
        # SGLang leaves its sockets behind in the temporary folder; in one of our own they can be removed. What torch
        # compiles is kept elsewhere, for the next server.
        self._scratch = tempfile.mkdtemp(prefix="modelopt-server-")
        compiled = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
        variables = {"TORCHINDUCTOR_CACHE_DIR": str(compiled), **os.environ, "TMPDIR": self._scratch}
        variables["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
        if self.on_cpu:
            variables.update(cpu_environment())
        given = {**variables, **self.environment}
        environment = {name: value for name, value in given.items() if value is not None}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.timeout
        with ticking(f"starting the server on {self.model.name}", self.progress) as note:
            while not self._is_ready():
                if self._exit_code() is not None:
                    raise self._failure(f"exit code {self._exit_code()}")
                if time.monotonic() > deadline:
                    raise self._failure(f"no answer for {self.timeout:.0f} s")
                note(self._last_message())
                time.sleep(_POLL_SECONDS)

    def _is_ready(self) -> bool:
        try:
            with open_url(f"{self.url}/health", None, timeout=5.0):
                return True
        except OSError:
            return False

    def _exit_code(self) -> int | None:
        return self._process.poll() if self._process else -1

    def tail(self, lines: int = TAIL_LINES) -> list[str]:
        """The last non-empty lines of the log."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            text = log.read().decode("utf-8", errors="replace")
        return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()][-lines:]

    def _last_message(self) -> str:
        """The last line that SGLang logged, without its time; not our own polling, nor warnings of libraries."""
        messages = [match.group(1) for line in self.tail() if (match := _LOG_LINE.match(line))]
        return messages[-1] if messages else ""

    def _failure(self, got: str) -> ModelOptExtError:
        """The error for a server that is gone: our own one-line message where the log has one, else its last line."""
        tail = self.tail()
        ours = next((match.group(1) for line in reversed(tail) if (match := _OUR_ERROR.search(line))), None)
        if ours is not None:
            return ModelOptExtError(ours)
        print(f"last lines of {self.log}:", *(line[:300] for line in tail), sep="\n  ", file=sys.stderr)
        last = tail[-1][:200] if tail else "an empty log"
        return ModelOptExtError.at(self.log, "server", "it to be running", f"{got}; last line: {last}")

    def _unreachable(self, error: Exception) -> ModelOptExtError:
        code = self._exit_code()
        return self._failure(str(error) if code is None else f"exit code {code}")

    def stop(self) -> None:
        """Ends every process of the server's session: asks once, then kills what is left."""
        process, self._process = self._process, None
        try:
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(_STOP_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass  # an impatient second Ctrl-C: no more asking
        finally:
            if process is not None:
                kill_session(process.pid)
                process.wait()
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)
                self._scratch = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_session(session: int) -> None:
    """Kills every process of a session, again until none is left: one may be starting another meanwhile."""
    for _ in range(50):
        alive = [process for process in psutil.process_iter() if _is_in_session(process, session)]
        if not alive:
            return
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=0.2)


def _is_in_session(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
        return False
