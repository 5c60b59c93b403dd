"""A server of a few lines that answers SGLang's endpoints as the benchmark asks them."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FIRST, EACH = 0.02, 0.002
"""Seconds for a request and for each of its tokens."""


class Stub(ThreadingHTTPServer):
    """A server that answers like SGLang: so many tokens, after so much time, with a prefix cache.

    Attributes:
        bodies: requests to ``/generate``.
        seen: prompts that are cached.
        paths: of all requests.
        running, most: requests at the moment, and the most so far.
        caches: whether answers report cached tokens.
        extra_tokens: more of them than a request asks for.
        delay: further seconds for each request.
        profiled: called with the request to ``/start_profile``.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.seen: set[tuple[int, ...]] = set()
        self.paths: list[str] = []
        self.running = self.most = 0
        self.caches, self.extra_tokens, self.delay = True, 0, 0.0
        self.profiled: Callable[[dict[str, Any]], None] | None = None

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        """Answer a request."""
        stub = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub.paths.append(self.path)
        answer: dict[str, Any] = {}
        if self.path.startswith("/flush_cache"):
            stub.seen.clear()
        elif self.path == "/generate":
            answer = {"meta_info": self.generate(body)}
        elif self.path == "/start_profile" and stub.profiled is not None:
            stub.profiled(body)
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the client did not wait so long
            self.wfile.write(text)

    def generate(self, body: dict[str, Any]) -> dict[str, int]:
        """Take the time of a request; return its ``meta_info``."""
        stub, ids = self.server, tuple(body["input_ids"])
        tokens = body["sampling_params"]["max_new_tokens"]
        with stub.lock:
            cached = len(ids) - 1 if stub.caches and ids in stub.seen else 0
            stub.seen.add(ids)
            stub.bodies.append(body)
            stub.running += 1
            stub.most = max(stub.most, stub.running)
        time.sleep(FIRST + EACH * tokens + stub.delay)
        with stub.lock:
            stub.running -= 1
        return {"completion_tokens": tokens + stub.extra_tokens, "cached_tokens": cached}

    def log_message(self, *args: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def running_stub() -> Iterator[Stub]:
    """Yield a stub that answers until the block ends."""
    server = Stub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
