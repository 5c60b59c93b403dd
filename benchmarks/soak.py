"""A long run of one SGLang server: run ``python -m benchmarks.soak [OPTION]``.

OPTION is that of ``sglang-modelopt bench``: a recipe, served from a small model with random weights, or a checkpoint's folder, and
variants behind ``+``. Requests of mixed lengths are sent by several clients; some share a prefix, some are aborted by name or by
closing the connection, some are too long, and the cache is flushed now and then. The KV cache is small and SGLang optimistic about
it, so that requests may be retracted. Checked are every answer, greedy answers before and after, and the memory of all of the
server's processes. Arguments behind ``--`` go to the server.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.bench.models import SHAPES
from sglang_modelopt_ext.workflow.bench.options import Option, parse_option
from sglang_modelopt_ext.workflow.bench.run import prepare
from sglang_modelopt_ext.workflow.server.client import open_url, vocabulary_size
from sglang_modelopt_ext.workflow.server.process import ServerProcess

FOLDER = Path("~/.cache/sglang-modelopt/bench")
POOL_TOKENS = 1024
LONGEST = 400
"""Tokens of a prompt, at most; three of them and their answers do not fit the pool."""
LONG_ANSWER = 300
BURST_EVERY, BURST = 200, 16
"""Every so often so many requests in turn want long answers: together they do not fit the pool, and some are retracted."""
GREEDY_PROMPTS, GREEDY_TOKENS = 8, 32
FLUSH_EVERY = 150
SAMPLE_SECONDS = 5.0
TIMEOUT = 300.0
SETTLING = 0.25
"""The part of a run after which memory must not grow: by then every size of batch was seen."""
MOST_GROWTH = 0.05


@dataclass
class Outcome:
    """The counts and measurements of a run.

    Attributes:
        sent: requests by kind.
        seconds: of the load.
        errors: the first lines of what went wrong.
        error_count: of all errors.
        flushes: of the cache.
        retracted: requests that SGLang took back for want of room.
        greedy_equal: whether greedy answers before and after are the same tokens.
        memory: pairs of (requests sent, MB of all processes: memory that they share counts once).
    """

    sent: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)
    error_count: int = 0
    flushes: int = 0
    retracted: float = 0.0
    greedy_equal: bool = False
    memory: list[tuple[int, float]] = field(default_factory=list)

    def settled(self) -> list[tuple[int, float]]:
        """Return the samples of memory behind the first part of the run."""
        total = sum(self.sent.values())
        return [(sent, size) for sent, size in self.memory if sent >= SETTLING * total]

    def growth(self) -> float:
        """Return MB for 1000 requests: the slope of a line through the settled samples, 0 for fewer than three."""
        samples = self.settled()
        if len({sent for sent, _ in samples}) < 3:
            return 0.0
        return 1000 * statistics.linear_regression(*zip(*samples, strict=True)).slope

    def is_flat(self) -> bool:
        """Return whether the last third of the settled samples is at most ``MOST_GROWTH`` above the first third."""
        sizes = [size for _, size in self.settled()]
        third = len(sizes) // 3
        if not third:
            return True
        return statistics.median(sizes[-third:]) <= (1 + MOST_GROWTH) * statistics.median(sizes[:third])

    def passed(self) -> bool:
        """Return whether there was no error, memory is flat, and greedy answers are equal."""
        return not self.error_count and self.greedy_equal and self.is_flat()

    def text(self) -> str:
        """Return a summary."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.sent.most_common())
        sizes = [size for _, size in self.settled()] or [0.0]
        lines = [
            f"{sum(self.sent.values())} requests in {self.seconds:.0f} s: {kinds}",
            f"{self.flushes} flushes of the cache, {self.retracted:.0f} retracted requests",
            f"errors: {self.error_count}",
            *(f"  {error}" for error in self.errors),
            f"memory: {sizes[0]:.0f} MB after {SETTLING:.0%} of them, {sizes[-1]:.0f} MB at the end, {self.growth():+.2f} MB "
            f"for 1000 requests: {'flat' if self.is_flat() else 'GROWS'}",
            f"greedy answers before and after: {'equal' if self.greedy_equal else 'DIFFERENT'}",
        ]
        return "\n".join(lines)


class Soak:
    """A load of mixed requests on one server.

    Args:
        server: the running server.
        seed: of the requests.
    """

    def __init__(self, server: ServerProcess, seed: int) -> None:
        self.server = server
        self.seed = seed
        self.outcome = Outcome()
        self.vocabulary = vocabulary_size(server.model)
        self._lock = threading.Lock()
        self._idle = threading.Condition()
        self._running = 0
        self._flushing = False
        shared = random.Random(f"{seed} prefixes")
        self.prefixes = [self._tokens(shared, length) for length in (16, 64, 128, 200)]

    def _tokens(self, generator: random.Random, count: int) -> list[int]:
        return [generator.randrange(4, self.vocabulary) for _ in range(count)]

    def greedy(self) -> list[list[int]]:
        """Return greedy answers to fixed prompts, one at a time on an empty cache."""
        generator = random.Random(f"{self.seed} greedy")
        self.server.flush_cache()
        answers = []
        for _ in range(GREEDY_PROMPTS):
            prompt = self._tokens(generator, generator.randint(8, LONGEST))
            answers.append(self._generate(prompt, GREEDY_TOKENS, {"temperature": 0.0})["output_ids"])
        return answers

    def _generate(self, ids: list[int], tokens: int, sampling: dict[str, Any], **more: Any) -> Any:
        settings = {"max_new_tokens": tokens, "ignore_eos": True, **sampling}
        return self.server.request("/generate", {"input_ids": ids, "sampling_params": settings, **more})

    def run(self, requests: int, clients: int, seconds: float | None) -> Outcome:
        """Send requests until their number or the time is reached, and check memory and greedy answers."""
        before = self.greedy()
        began, done = time.monotonic(), threading.Event()
        watcher = threading.Thread(target=self._watch_memory, args=(done,), daemon=True)
        watcher.start()
        numbers = iter(range(requests))

        def client() -> None:
            while seconds is None or time.monotonic() - began < seconds:
                with self._lock:
                    number = next(numbers, None)
                if number is None:
                    return
                self._one(number)

        with ThreadPoolExecutor(clients) as pool:
            for future in [pool.submit(client) for _ in range(clients)]:
                future.result()
        self.outcome.seconds = time.monotonic() - began
        done.set()
        watcher.join()
        self.outcome.retracted = self._retracted()
        self.outcome.greedy_equal = self.greedy() == before
        return self.outcome

    def _one(self, number: int) -> None:
        """Send request ``number`` of a kind that it decides, alone where it flushes the cache."""
        generator = random.Random(f"{self.seed} {number}")
        kinds: dict[str, tuple[int, Callable[[random.Random, int], None]]] = {
            "answered": (80, self._answered),
            "aborted by name": (7, self._aborted),
            "closed by the client": (7, self._closed),
            "too long": (2, self._too_long),
            "scored": (4, self._scored),
        }
        kind = generator.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]
        with self._idle:
            self._idle.wait_for(lambda: not self._flushing)
            self._running += 1
        try:
            kinds[kind][1](generator, number)
        except (ModelOptExtError, OSError, http.client.HTTPException, KeyError, ValueError) as error:
            self._failed(f"request {number} ({kind}): {error!r}"[:300])
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()
        with self._lock:
            self.outcome.sent[kind] += 1
        if number % FLUSH_EVERY == FLUSH_EVERY - 1:
            self._flush()

    def _failed(self, line: str) -> None:
        with self._lock:
            self.outcome.error_count += 1
            if len(self.outcome.errors) < 10:
                self.outcome.errors.append(line)

    def _flush(self) -> None:
        """Flush the cache once the requests under way have ended; SGLang does not with requests."""
        with self._idle:
            self._flushing = True
            self._idle.wait_for(lambda: self._running == 0)
        try:
            self.server.request("/flush_cache?timeout=30", {})
            self.outcome.flushes += 1
        except ModelOptExtError as error:
            self._failed(f"flush: {error}"[:300])
        finally:
            with self._idle:
                self._flushing = False
                self._idle.notify_all()

    def _prompt(self, generator: random.Random) -> list[int]:
        prefix = generator.choice(self.prefixes) if generator.random() < 0.4 else []
        return [*prefix, *self._tokens(generator, generator.randint(1, LONGEST - len(prefix)))]

    def _answered(self, generator: random.Random, number: int) -> None:
        tokens = generator.choices((1, 2, 8, 32, 96, LONG_ANSWER), (5, 5, 5, 3, 2, 1))[0]
        if number % BURST_EVERY < BURST:
            tokens = LONG_ANSWER
        sampling = {"temperature": generator.choice((0.0, 0.8)), "top_p": generator.choice((1.0, 0.9))}
        prompt = self._prompt(generator)
        if tokens == LONG_ANSWER:
            # A short prompt is admitted beside others whose answers will not fit the pool together with its own, unless SGLang
            # knows that the answer will not end before.
            prompt, sampling = prompt[:20], {**sampling, "ignore_eos": False}
        answer = self._generate(prompt, tokens, sampling)
        ids = answer["output_ids"]
        ended = tokens == LONG_ANSWER and answer["meta_info"]["finish_reason"]["type"] == "stop"
        if not (len(ids) == tokens or ended) or not all(0 <= token < self.vocabulary for token in ids):
            raise ValueError(f"{tokens} tokens expected, got {ids[:200]}")

    def _scored(self, generator: random.Random, number: int) -> None:
        prompt = self._prompt(generator)
        answer = self._generate(prompt, 1, {"temperature": 0.0}, return_logprob=True, logprob_start_len=0)
        scores = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
        if len(scores) != len(prompt) - 1 or not all(-1e4 < score <= 0 for score in scores):
            raise ValueError("finite log probabilities of every token expected")

    def _aborted(self, generator: random.Random, number: int) -> None:
        """Abort a request by its name while it runs; it is answered with what it has."""
        name, delay = f"soak-{self.seed}-{number}", generator.random()
        timer = threading.Timer(delay, self._abort, (name,))
        timer.start()
        try:
            with suppress(ModelOptExtError):  # a request that was not begun is answered with an error
                self._generate(self._prompt(generator), 200, {"temperature": 0.0}, rid=name)
        finally:
            timer.cancel()

    def _abort(self, name: str) -> None:
        with suppress(ModelOptExtError):
            self.server.request("/abort_request", {"rid": name})

    def _closed(self, generator: random.Random, number: int) -> None:
        """Close the connection of a streamed answer after its first part."""
        sampling = {"max_new_tokens": 200, "ignore_eos": True, "temperature": 0.0}
        body = {"input_ids": self._prompt(generator), "sampling_params": sampling, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=TIMEOUT)
        try:
            connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
            connection.getresponse().read(1)
        finally:
            connection.close()

    def _too_long(self, generator: random.Random, number: int) -> None:
        try:
            self._generate(self._tokens(generator, 2 * POOL_TOKENS), 8, {"temperature": 0.0})
        except ModelOptExtError as error:
            if " 400 " in str(error):
                return
            raise
        raise ValueError("HTTP 400 expected for a prompt that does not fit the pool")

    def _watch_memory(self, done: threading.Event) -> None:
        while True:
            size = 0
            for process in self.server.processes.living():
                with suppress(psutil.Error):
                    size += process.memory_full_info().pss
            self.outcome.memory.append((sum(self.outcome.sent.values()), size / 2**20))
            if done.wait(SAMPLE_SECONDS):
                return

    def _retracted(self) -> float:
        """Return the number of retracted requests, by the server's own counter."""
        with open_url(f"{self.server.url}/metrics", None, TIMEOUT) as response:
            text = response.read().decode()
        found = re.findall(r"^sglang:num_retracted_requests_total\{[^}]*\} (\S+)$", text, re.M)
        return sum(map(float, found))


def server_of(option: Option, model: Path, log: Path, clients: int, extra: Sequence[str]) -> ServerProcess:
    """Return the server of an option, with a small pool that SGLang is optimistic about."""
    arguments = ["--skip-tokenizer-init", "--random-seed", "0", "--max-running-requests", str(clients)]
    arguments += ["--enable-metrics", "--schedule-conservativeness", "0.05", "--chunked-prefill-size", "256"]
    arguments += ["--max-total-tokens", str(POOL_TOKENS)]  # on a GPU too
    return ServerProcess(
        model,
        log=log,
        arguments=[*arguments, *option.arguments, *extra],
        environment={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **option.environment},
        timeout=TIMEOUT,
        progress=False,
    )


def main(words: Sequence[str]) -> int:
    """Run the command line; return 1 when an error was seen, memory grew or greedy answers differ."""
    split = list(words).index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("option", nargs="?", default="nvfp4+kv-nvfp4", metavar="OPTION", help="default: %(default)s")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="sizes of a recipe's model (default: tiny)")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, help="end after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, default=FOLDER / "models")
    parser.add_argument("--log", type=Path, default=FOLDER / "logs" / "soak.log")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples of memory")
    arguments = parser.parse_args(words[:split])
    option = parse_option(arguments.option)
    device, folders = prepare([option], arguments.shape, arguments.models.expanduser())
    extra = list(words[split + 1 :])
    with server_of(option, folders[option.name], arguments.log.expanduser(), arguments.clients, extra) as server:
        outcome = Soak(server, arguments.seed).run(arguments.requests, arguments.clients, arguments.seconds)
    print(f"{option.name} ({arguments.shape}), {device}, {arguments.clients} clients, seed {arguments.seed}")
    print(outcome.text())
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(vars(outcome), indent=1) + "\n", encoding="utf-8")
    return int(not outcome.passed())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
