"""Starting and ending a server process: failures with a reason, and nothing left running. No SGLang involved."""

from __future__ import annotations

import base64
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.server.client import vocabulary_size
from sglang_modelopt_ext.workflow.server.process import ServerProcess
from sglang_modelopt_ext.workflow.server.process_tree import ProcessTree

# A process that starts a child, which starts a grandchild; all ignore the polite signals.
FAMILY = """
    import os, signal, subprocess, sys, time
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    depth = int(sys.argv[1])
    if depth:
        subprocess.Popen([sys.executable, "-c", sys.argv[2], str(depth - 1), sys.argv[2]])
    print(os.getpid(), flush=True)
    time.sleep(600)
"""
HEALTHY = """
    import http.server, sys
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def fake_server(tmp_path: Path, script: str, *arguments: str, timeout: float = 30.0) -> ServerProcess:
    """Return a ServerProcess that runs a script instead of SGLang."""
    server = ServerProcess(tmp_path, log=tmp_path / "log", timeout=timeout, progress=False)
    server.command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return server


def alive(pids: list[int]) -> list[int]:
    """Return those of the processes that still run."""
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def family_pids(log: Path, count: int) -> list[int]:
    """Return the process ids that FAMILY printed, once there are ``count``."""
    for _ in range(200):
        pids = [int(line) for line in log.read_text().split()]
        if len(pids) == count:
            return pids
        time.sleep(0.05)
    raise AssertionError(f"only {pids} started")


def test_command_line_and_flags(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, log=tmp_path / "log", quantization="modelopt_w4a8", arguments=["--tp", "2"])
    assert server.command[1:5] == ["-m", "sglang.launch_server", "--model-path", str(tmp_path)]
    assert server.command[-2:] == ["--tp", "2"]
    assert server.command[server.command.index("--quantization") + 1] == "modelopt_w4a8"
    assert ("--max-total-tokens" in server.command) == server.on_cpu
    assert "--quantization" not in ServerProcess(tmp_path, log=tmp_path / "log").command


def test_ready_when_healthy_and_gone_afterwards(tmp_path: Path) -> None:
    server = fake_server(tmp_path, HEALTHY)
    server.command.append(str(server.port))
    with server:
        started = [process.pid for process in server.processes.living()]
        assert started
    assert not alive(started)
    server.stop()


def test_failure_shows_the_tail_of_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = fake_server(tmp_path, "print('one'); print('two'); raise SystemExit(3)")
    with pytest.raises(ModelOptExtError, match="expected it to be running, got exit code 3; last line: two"), server:
        pass
    assert capsys.readouterr().err.splitlines()[-2:] == ["  one", "  two"]


def test_failure_of_ours_is_passed_on(tmp_path: Path) -> None:
    server = fake_server(tmp_path, "print('ModelOptExtError: a: b: expected c, got d'); print('bye'); exit(1)")
    with pytest.raises(ModelOptExtError) as failure, server:
        pass
    assert str(failure.value) == "a: b: expected c, got d"


def test_timeout_ends_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServerProcess, "stop_seconds", 0.2)
    code = textwrap.dedent(FAMILY)
    server = fake_server(tmp_path, FAMILY, "2", code, timeout=3.0)
    with pytest.raises(ModelOptExtError, match="no answer for 3 s"), server:
        pass
    assert not alive(family_pids(tmp_path / "log", 3))


def test_interrupt_in_the_block_ends_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServerProcess, "stop_seconds", 0.2)
    monkeypatch.setattr(ServerProcess, "is_ready", lambda self: True)
    pids: list[int] = []
    # A shell starts background jobs with SIGINT ignored, and Python then installs no handler for it.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)

    def block() -> None:
        with fake_server(tmp_path, FAMILY, "2", textwrap.dedent(FAMILY)):
            pids.extend(family_pids(tmp_path / "log", 3))
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            block()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert len(pids) == 3
    assert not alive(pids)


def test_orphans_of_the_session_are_killed_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = textwrap.dedent(FAMILY)
    processes = ProcessTree()
    leader = processes.start([sys.executable, "-c", code, "2", code], os.environ, log)
    pids = family_pids(log, 3)
    leader.kill()
    leader.wait()
    assert len(alive(pids)) == 2
    assert processes.kill() == ()
    assert not alive(pids)
    assert alive([os.getpid()])


def answering(monkeypatch: pytest.MonkeyPatch, answer: Callable[[dict[str, Any]], Any]) -> None:
    """Replace the HTTP requests."""
    monkeypatch.setattr(ServerProcess, "request", lambda self, path, payload: answer(payload))


def test_full_vocabulary_rows_are_put_in_token_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    rows = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    order = np.argsort(-rows, axis=1)

    def answer(payload: dict[str, Any]) -> Any:
        assert payload["top_logprobs_num"] == vocabulary_size(tmp_path) == 5
        some = slice(payload["logprob_start_len"], None)
        values = np.take_along_axis(rows, order, axis=1)[some]
        encoded = {"val": values, "idx": order[some].astype(np.int32)}
        info = {f"input_top_logprobs_{k}_flat_b64": base64.b64encode(v.tobytes()).decode() for k, v in encoded.items()}
        return {"meta_info": {**info, "input_top_logprobs_shape": list(values.shape)}}

    answering(monkeypatch, answer)
    server = ServerProcess(tmp_path, log=tmp_path / "log")
    np.testing.assert_array_equal(server.full_vocab_logprobs([1, 2, 3, 4]), rows)
    np.testing.assert_array_equal(server.full_vocab_logprobs([1, 2, 3, 4], 2), rows[-2:])


def test_input_logprobs_are_those_of_the_tokens_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [[None, 7, None], [-0.5, 8, None], [-1.5, 9, None]]
    answering(monkeypatch, lambda payload: {"meta_info": {"input_token_logprobs": entries}})
    server = ServerProcess(tmp_path, log=tmp_path / "log")
    assert server.input_logprobs([7, 8, 9]).tolist() == [-0.5, -1.5]
    with pytest.raises(ModelOptExtError, match="one entry for every token sent"):
        server.input_logprobs([7, 8, 10])
