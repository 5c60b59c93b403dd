"""The real SGLang server on a CPU: started in a process group of its own, asked over HTTP, and gone afterwards.

A server takes 20 to 60 s to start on two cores; share one between tests where they allow it.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import requests
import torch

from tests.support.processes import ProcessTree

Entrypoint = Literal["launch_server", "serve"]

START_TIMEOUT = 240.0
REFUSE_TIMEOUT = 180.0
REQUEST_TIMEOUT = 120.0
POLL_SECONDS = 0.3
PROGRESS_SECONDS = 15.0
TAIL_CHARACTERS = 4000


class ServerError(RuntimeError):
    """The server did not start, or did not answer; the message ends with the end of its log."""


@dataclass(frozen=True)
class Refusal:
    """How a server that did not start went down.

    Attributes:
        exit_code: of the first process; negative: the signal that ended it.
        output: everything printed by all processes.
        seconds: from start to exit.
        left_behind: command lines of processes that outlived it by more than five seconds (they are killed).
    """

    exit_code: int
    output: str
    seconds: float
    left_behind: tuple[str, ...]


class Server:
    """``with Server(folder) as server: server.generate(ids, 8)``.

    Args:
        model: the checkpoint.
        dtype: the ``--dtype`` flag.
        tp: the number of tensor-parallel ranks.
        args: further arguments, such as ``("--quantization", "modelopt_ext")``.
        env: environment variables to set; None as a value takes one away.
        log: the file for the output of all processes; by default one that is gone afterwards.
        entrypoint: ``python -m sglang.launch_server`` or ``sglang serve``.
        timeout: seconds until it must be healthy.
    """

    def __init__(
        self,
        model: Path,
        *,
        dtype: str = "bfloat16",
        tp: int = 1,
        args: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        log: Path | None = None,
        entrypoint: Entrypoint = "launch_server",
        timeout: float = START_TIMEOUT,
    ) -> None:
        self.model = model
        self.timeout = timeout
        self.start_seconds = 0.0
        self._scratch = Path(tempfile.mkdtemp(prefix="test-server-"))
        self.log = log or self._scratch / "server.log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [*entrypoint_command(entrypoint), "--model-path", str(model), "--port", str(self.port)]
        self.command += ["--host", "127.0.0.1", "--device", "cpu", "--attention-backend", "torch_native"]
        self.command += ["--max-total-tokens", "8192", "--max-running-requests", "8"]
        # A server that waits for its next test would keep a core busy.
        self.command += ["--sleep-on-idle"]
        self.command += ["--dtype", dtype, "--tp-size", str(tp), *args]
        self.processes = ProcessTree()
        self.env = server_environment(tp) | {"TMPDIR": str(self._scratch)}
        for name, value in (env or {}).items():
            self.env.pop(name, None)
            if value is not None:
                self.env[name] = value
        self._process: subprocess.Popen[bytes] | None = None
        self._session = requests.Session()
        self._session.trust_env = False  # never through a proxy

    # Life and death

    def __enter__(self) -> Self:
        try:
            self.launch()
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def launch(self) -> subprocess.Popen[bytes]:
        """Starts the process and returns at once."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._process = self.processes.start(self.command, self.env, self.log)
        return self._process

    def stop(self) -> None:
        """Kills every process of the server and makes sure that none is left."""
        process, self._process = self._process, None
        left = self.processes.kill() if process is not None else ()
        if process is not None and not left:
            process.wait()
        self._session.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
        if left:
            raise ServerError(f"processes survived: {left}")

    def is_healthy(self) -> bool:
        """Whether the server generates; it answers after about a second."""
        try:
            return self._session.get(f"{self.url}/health", timeout=30).status_code == 200
        except requests.RequestException:
            return False

    def output(self) -> str:
        """Everything the processes have printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        start = shown = time.monotonic()
        while not self.is_healthy():
            now = time.monotonic()
            if self._process.poll() is not None:
                raise self._error(f"the server exited with {self._process.returncode} after {now - start:.0f} s")
            if now - start > self.timeout:
                raise self._error(f"the server was not healthy after {self.timeout:.0f} s")
            if now - shown > PROGRESS_SECONDS:
                shown = now
                last = (self.output().strip().splitlines() or [""])[-1]
                print(f"server on {self.model.name}: {now - start:.0f} s, {last[:150]}", file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)
        self.start_seconds = time.monotonic() - start

    def _error(self, what: str) -> ServerError:
        return ServerError(f"{what}; its log ends with\n{self.output()[-TAIL_CHARACTERS:]}")

    # Requests

    def post(self, path: str, payload: Any) -> Any:
        """The JSON answer to a JSON request (the text where it is not JSON). Raises ServerError unless it is 200."""
        try:
            response = self._session.post(f"{self.url}{path}", json=payload, timeout=REQUEST_TIMEOUT)
        except requests.RequestException as error:
            raise self._error(f"{path}: {error}") from error
        if response.status_code != 200:
            raise self._error(f"{path}: HTTP {response.status_code} {response.text[:500]}")
        try:
            return response.json()
        except json.JSONDecodeError:
            return response.text

    def generate(self, ids: Sequence[int], max_new_tokens: int, **sampling: Any) -> list[int]:
        """The greedy continuation of a prompt, exactly ``max_new_tokens`` long unless ``ignore_eos=False`` is given."""
        parameters = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True, **sampling}
        answer = self.post("/generate", {"input_ids": list(ids), "sampling_params": parameters})
        tokens: list[int] = answer["output_ids"]
        return tokens

    def input_logprobs(self, ids: Sequence[int]) -> list[float]:
        """The log probability of each token but the first, given those before it: ``len(ids) - 1`` numbers."""
        entries = self._score(ids, {})["input_token_logprobs"]
        assert [entry[1] for entry in entries] == list(ids), "the server scored other tokens than it was sent"
        return [entry[0] for entry in entries[1:]]

    def top_logprobs(self, ids: Sequence[int], k: int) -> list[dict[int, float]]:
        """The ``k`` likeliest followers of every token of ``ids`` and their log probabilities."""
        info = self._score(ids, {"top_logprobs_num": k})
        rows = [*info["input_top_logprobs"][1:], info["output_top_logprobs"][0]]
        return [{entry[1]: entry[0] for entry in row} for row in rows]

    def full_logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """Log probabilities over the whole vocabulary ``[len(ids), V]``: row ``t`` is what follows ``ids[t]``."""
        vocab = json.loads((self.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        options = {
            "top_logprobs_num": vocab,
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_output_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }
        info = self._score(ids, options)
        rows = torch.cat([_table(info, side, vocab) for side in ("input", "output")])
        assert rows.shape == (len(ids), vocab), f"{list(rows.shape)} for {[len(ids), vocab]}"
        return rows

    def batch(self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 1) -> list[dict[str, Any]]:
        """Sends all prompts at once, each in a request of its own.

        Returns:
            The answers in order, with ``output_ids`` and ``meta_info["input_token_logprobs"]`` from the first token on.
        """
        sampling = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        options = {"sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
            return list(pool.map(lambda ids: self.post("/generate", {"input_ids": list(ids), **options}), prompts))

    def flush_cache(self) -> None:
        """Forgets the prefixes of earlier prompts."""
        self.post("/flush_cache", {})

    def _score(self, ids: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
        sampling = {"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True}
        payload = {"input_ids": list(ids), "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        info: dict[str, Any] = self.post("/generate", {**payload, **options})["meta_info"]
        return info


def failing_start(model: Path, *, timeout: float = REFUSE_TIMEOUT, **options: Any) -> Refusal:
    """Starts a server that must not come up, and waits until it is gone.

    Args:
        model: the checkpoint.
        timeout: seconds until it must have exited.
        options: those of :class:`Server`.

    Raises:
        AssertionError: it became healthy, or was still there at the timeout.
    """
    server = Server(model, **options)
    start = time.monotonic()
    try:
        process = server.launch()
        while process.poll() is None:
            assert not server.is_healthy(), "the server started although it should refuse"
            assert time.monotonic() - start < timeout, server._error(f"neither up nor gone after {timeout:.0f} s")
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - start
        deadline = time.monotonic() + 5
        while (left := server.processes.describe()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return Refusal(process.returncode, server.output(), seconds, left)
    finally:
        server.stop()


def run_entrypoint(*args: str, timeout: float = 120.0, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Runs the ``sglang`` command to its end, such as ``run_entrypoint("serve", "--help")``: exit code and output."""
    processes = ProcessTree()
    with tempfile.TemporaryDirectory(prefix="test-entrypoint-") as scratch:
        log = Path(scratch) / "output.log"
        try:
            process = processes.start([*_sglang_command(), *args], {**server_environment(1), **(env or {})}, log)
            code = process.wait(timeout)
        finally:
            processes.kill()
        return code, log.read_text(encoding="utf-8", errors="replace")


def entrypoint_command(entrypoint: Entrypoint) -> list[str]:
    """The beginning of the command line."""
    if entrypoint == "launch_server":
        return [sys.executable, "-m", "sglang.launch_server"]
    return [*_sglang_command(), "serve"]


def _sglang_command() -> list[str]:
    # The console script beside the interpreter: ``python -m sglang.cli.main`` has no main guard and does nothing.
    return [sys.executable, str(Path(sys.executable).with_name("sglang"))]


def server_environment(tp: int) -> dict[str, str]:
    """The environment of a server: on the CPU, offline, and one thread to a rank (tiny models gain nothing by more)."""
    environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if tp > 1:
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(tp))
    return environment


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _table(info: Mapping[str, Any], side: str, vocab: int) -> torch.Tensor:
    """Rows of log probabilities by token from flat arrays sorted by probability."""
    values, tokens = (
        np.frombuffer(base64.b64decode(info[f"{side}_top_logprobs_{name}_flat_b64"]), dtype=dtype).reshape(-1, vocab)
        for name, dtype in (("val", np.float32), ("idx", np.int32))
    )
    rows = torch.full(values.shape, float("nan"))
    rows.scatter_(1, torch.tensor(tokens, dtype=torch.int64), torch.tensor(values))
    assert not rows.isnan().any(), f"{side} log probabilities have gaps"
    return rows
