"""An SGLang server on a CPU for tests: requests by token ids, and starts that must fail.

A server takes 20 to 60 s to start on two cores; share one between tests where they allow it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch

from sglang_modelopt_ext.workflow.server.client import FULL_VOCABULARY, vocabulary_size
from sglang_modelopt_ext.workflow.server.process import ServerProcess, cpu_environment

Entrypoint = Literal["launch_server", "serve"]

START_TIMEOUT = 240.0
FAILED_START_TIMEOUT = 180.0
POLL_SECONDS = 0.3
TAIL_CHARACTERS = 4000


@dataclass(frozen=True)
class FailedStart:
    """The end of a server that did not start.

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


class Server(ServerProcess):
    """``with Server(folder) as server: server.generate_ids(ids, 8)``.

    Args:
        model: the checkpoint.
        dtype: the ``--dtype`` flag.
        tp: the number of tensor-parallel ranks.
        args: further arguments, such as ``("--quantization", "modelopt_ext")``.
        env: environment variables to set; None as a value removes one.
        entrypoint: ``python -m sglang.launch_server`` or ``sglang serve``.
        timeout: seconds until it must be ready.
        record: whether it records the log probabilities of windows.
    """

    stop_seconds = 0.0

    def __init__(
        self,
        model: Path,
        *,
        dtype: str = "bfloat16",
        tp: int = 1,
        args: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        entrypoint: Entrypoint = "launch_server",
        timeout: float = START_TIMEOUT,
        record: bool = False,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="test-server-"))
        # --sleep-on-idle: a server that waits for its next test would keep a core busy.
        arguments = ["--max-running-requests", "8", "--sleep-on-idle", "--dtype", dtype, "--tp-size", str(tp), *args]
        super().__init__(
            model,
            log=self._folder / "server.log",
            arguments=arguments,
            environment={**server_variables(tp), **(env or {})},
            on_cpu=True,
            timeout=timeout,
            record=record,
        )
        if entrypoint == "serve":
            # The console script beside the interpreter: ``python -m sglang.cli.main`` has no main guard and does nothing.
            script = Path(sys.executable).with_name("sglang")
            self.command[:3] = [sys.executable, str(script), "serve"]

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if value is not None:
            print(f"the server's log ends with\n{self.output()[-TAIL_CHARACTERS:]}", file=sys.stderr)
        super().__exit__(kind, value, traceback)

    def stop(self) -> None:
        """End every process of the server and remove its log."""
        super().stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def output(self) -> str:
        """Return everything the processes have printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def generate_ids(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of a prompt, exactly ``max_new_tokens`` long."""
        sampling = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        answer = self.request("/generate", {"input_ids": list(ids), "sampling_params": sampling})
        tokens: list[int] = answer["output_ids"]
        return tokens

    def top_logprobs(self, ids: Sequence[int], k: int) -> list[dict[int, float]]:
        """Return the ``k`` likeliest next tokens after each token of ``ids``, with their log probabilities."""
        info = self.score(ids, options={"top_logprobs_num": k})
        rows = [*info["input_top_logprobs"][1:], info["output_top_logprobs"][0]]
        return [{entry[1]: entry[0] for entry in row} for row in rows]

    def full_logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """Return log probabilities ``[len(ids), V]`` over the vocabulary: row ``t`` is for the token after ``ids[t]``."""
        vocabulary = vocabulary_size(self.model)
        options = {**FULL_VOCABULARY, "return_flat_raw_output_top_logprobs": True, "top_logprobs_num": vocabulary}
        info = self.score(ids, options=options)
        sides = (("input", len(ids) - 1), ("output", 1))
        return torch.from_numpy(
            np.concatenate([self.vocabulary_rows(info, side, (count, vocabulary)) for side, count in sides])
        )

    def batch(self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 1) -> list[dict[str, Any]]:
        """Send all prompts at once, each in a request of its own.

        Returns:
            The answers in order, with ``output_ids`` and ``meta_info["input_token_logprobs"]`` from the first token on.
        """
        sampling = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        options = {"sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
            return list(pool.map(lambda ids: self.request("/generate", {"input_ids": list(ids), **options}), prompts))


def failing_start(model: Path, *, timeout: float = FAILED_START_TIMEOUT, **options: Any) -> FailedStart:
    """Start a server that must not come up, and wait until it is gone.

    Args:
        model: the checkpoint.
        timeout: seconds until it must have exited.
        options: those of :class:`Server`.

    Raises:
        AssertionError: it became ready, or was still there at the timeout.
    """
    server = Server(model, **options)
    start = time.monotonic()
    try:
        server.start()
        while (code := server.exit_code()) is None:
            assert not server.is_ready(), "the server started although it should refuse"
            assert time.monotonic() - start < timeout, server.failure(f"neither up nor gone after {timeout:.0f} s")
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - start
        deadline = time.monotonic() + 5
        while (left := server.processes.describe()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return FailedStart(code, server.output(), seconds, left)
    finally:
        server.stop()


def server_variables(tp: int) -> dict[str, str]:
    """Return the variables of a server on the CPU: offline, and one thread per rank, since tiny models gain nothing by more."""
    variables = {**cpu_environment(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if tp > 1:
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(tp))
    return variables


def server_environment(tp: int) -> dict[str, str]:
    """Return this process's environment with the variables of a server on the CPU."""
    return {**os.environ, **server_variables(tp)}
