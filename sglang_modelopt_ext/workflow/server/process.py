"""An SGLang server process as a context manager: started, waited for with visible progress, ended with all its children."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.ports import free_port
from sglang_modelopt_ext.workflow.common.progress import elapsed_progress
from sglang_modelopt_ext.workflow.server.client import ServerClient, open_url, vocabulary_size
from sglang_modelopt_ext.workflow.server.process_tree import ProcessTree
from sglang_modelopt_ext.workflow.server.recorder import Recorder, can_record

TAIL_LINES = 20
_POLL_SECONDS = 0.5
_TAIL_BYTES = 32_768
_LOG_LINE = re.compile(r"\[\d{4}-\d\d-\d\d [^]]*\] (?!.*GET /health)(.*)")
_OUR_ERROR = re.compile(rf"{ModelOptExtError.__name__}: (.+)")


def cpu_arguments(max_total_tokens: int = 8192) -> dict[str, str]:
    """Return the command-line arguments that a server needs on a CPU."""
    return {
        "--device": "cpu",
        "--attention-backend": "torch_native",
        "--max-total-tokens": str(max_total_tokens),
    }


def cpu_environment() -> dict[str, str]:
    """Return the environment variables that a server needs on a CPU."""
    return {"SGLANG_USE_CPU_ENGINE": "1"}


class ServerProcess(ServerClient):
    """``python -m sglang.launch_server`` in a session of its own, ready when the ``with`` block begins.

    On leaving the block, also by an exception or Ctrl-C, the server and every process that came from it are ended.

    Args:
        model: the checkpoint's folder.
        log: the file that receives everything the server prints; replaced.
        quantization: the ``--quantization`` flag, None to leave it out.
        arguments: further command-line arguments of the server.
        environment: variables to set; None as a value removes one.
        on_cpu: whether to serve on the CPU; None: where there is no GPU.
        max_total_tokens: size of the KV cache on a CPU, where SGLang would otherwise take most of the memory.
        timeout: seconds the server may take to start, and later to answer.
        progress: whether to show a progress line while waiting.
        record: whether :meth:`window_logprobs` is to come from inside the server, without HTTP, where the arguments allow it.
    """

    stop_seconds = 10.0
    """Seconds that the server has to end by itself after SIGINT; 0: it is killed at once."""

    def __init__(
        self,
        model: Path,
        *,
        log: Path,
        quantization: str | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str | None] | None = None,
        on_cpu: bool | None = None,
        max_total_tokens: int = 8192,
        timeout: float = 600.0,
        progress: bool = True,
        record: bool = False,
    ) -> None:
        self.port = free_port()
        super().__init__(f"http://127.0.0.1:{self.port}", model, timeout)
        self.log = log
        self.progress = progress
        self.on_cpu = not torch.cuda.is_available() if on_cpu is None else on_cpu
        self.environment = dict(environment or {})
        self.command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port)]
        if quantization is not None:
            self.command += ["--quantization", quantization]
        if self.on_cpu:
            for name, value in cpu_arguments(max_total_tokens).items():
                self.command += [name, value]
        self.command += arguments
        self.processes = ProcessTree()
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: str | None = None
        self._records = record and can_record(arguments)
        self._recorder: Recorder | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process and return at once."""
        # SGLang leaves its sockets behind in the temporary folder; in one of our own they can be removed. Compiled
        # kernels of torch are kept elsewhere, for the next server.
        self._scratch = tempfile.mkdtemp(prefix="modelopt-server-")
        compiled = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
        variables = {"TORCHINDUCTOR_CACHE_DIR": str(compiled), **os.environ, "TMPDIR": self._scratch}
        variables["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
        if self.on_cpu:
            variables.update(cpu_environment())
        given = {**variables, **self.environment}
        environment = {name: value for name, value in given.items() if value is not None}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = self.command
        if self._records:
            folder = Path(self._scratch) / "recorder"
            folder.mkdir()
            self._recorder = Recorder(folder)
            command = [*command, *self._recorder.arguments()]
        self._process = self.processes.start(command, environment, self.log)

    @property
    def records(self) -> bool:
        """Whether the server records log probabilities, as far as is known."""
        return self._recorder is not None

    def window_logprobs(self, ids: Sequence[int], last: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the log probabilities of a window as :meth:`ServerClient.window_logprobs` does, recorded where possible."""
        if self._recorder is not None:
            self.flush_cache()  # a cached prefix would not be computed again
            payload = {"input_ids": list(ids), "sampling_params": {"temperature": 0.0, "max_new_tokens": 1}}
            found = self._recorder.record(
                ids, last, vocabulary_size(self.model), lambda: self.request("/generate", payload)
            )
            if found is not None:
                return found
            self._recorder = None
            tqdm.write("this server records no log probabilities: they travel over HTTP, slowly", file=sys.stderr)
        return super().window_logprobs(ids, last)

    def wait_until_ready(self) -> None:
        """Wait until the started server answers. Raises ModelOptExtError when it ends, or does not answer in time."""
        deadline = time.monotonic() + self.timeout
        with elapsed_progress(f"starting the server on {self.model.name}", self.progress) as note:
            while not self.is_ready():
                if self.exit_code() is not None:
                    raise self.failure(f"exit code {self.exit_code()}")
                if time.monotonic() > deadline:
                    raise self.failure(f"no answer for {self.timeout:.0f} s")
                note(self._last_message())
                time.sleep(_POLL_SECONDS)

    def is_ready(self) -> bool:
        """Return whether the server answers requests."""
        try:
            with open_url(f"{self.url}/health", None, timeout=5.0):
                return True
        except OSError:
            return False

    def exit_code(self) -> int | None:
        """Return the exit code of the first process: None while it runs, negative for the signal that ended it."""
        return self._process.poll() if self._process else -1

    def tail(self, lines: int = TAIL_LINES) -> list[str]:
        """Return the last non-empty lines of the log."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            text = log.read().decode("utf-8", errors="replace")
        return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()][-lines:]

    def _last_message(self) -> str:
        """Return the last line that SGLang logged, without its time; skip our polling and warnings of libraries."""
        messages = [match.group(1) for line in self.tail() if (match := _LOG_LINE.match(line))]
        return messages[-1] if messages else ""

    def failure(self, got: str) -> ModelOptExtError:
        """Return the error for a server that failed: this package's message where the log has one, else its last line.

        Args:
            got: the observed state, such as ``exit code 1``.
        """
        tail = self.tail()
        ours = next((match.group(1) for line in reversed(tail) if (match := _OUR_ERROR.search(line))), None)
        if ours is not None:
            return ModelOptExtError(ours)
        print(f"last lines of {self.log}:", *(line[:300] for line in tail), sep="\n  ", file=sys.stderr)
        last = tail[-1][:200] if tail else "an empty log"
        return ModelOptExtError.at(self.log, "server", "it to be running", f"{got}; last line: {last}")

    def _unreachable(self, error: Exception) -> ModelOptExtError:
        code = self.exit_code()
        return self.failure(str(error) if code is None else f"exit code {code}")

    def stop(self) -> None:
        """End the server and all its processes: interrupt it once, then kill the processes that are left.

        Raises:
            ModelOptExtError: a process that could not be killed.
        """
        process, self._process = self._process, None
        left: tuple[str, ...] = ()
        try:
            if process is not None and process.poll() is None and self.stop_seconds:
                process.send_signal(signal.SIGINT)
                process.wait(self.stop_seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass  # a second Ctrl-C: kill without waiting
        finally:
            if process is not None:
                left = self.processes.kill()
                if not left:
                    process.wait()
            self._recorder = None
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)
                self._scratch = None
        if left:
            raise ModelOptExtError.at(self.log, "server", "no process after its end", ", ".join(left))
