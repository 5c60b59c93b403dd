"""The load: requests of random token ids, sent together, timed from the first one sent to the last one answered.

Every server gets the requests that the same seed gives. A request asks for a fixed number of tokens and goes on after an
end-of-text token, so that each answer is known to have them.
"""

from __future__ import annotations

import functools
import http.client
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sglang_modelopt_ext.errors import ModelOptExtError

FLUSH_SECONDS = 20.0
UNCACHED_TOKENS = 256
"""Tokens of a prompt that may be computed again when its prefix is cached: a page and the last token, with room."""


class Deadline:
    """A point in time, ``seconds`` from now; None for never."""

    def __init__(self, seconds: float | None) -> None:
        self._end = float("inf") if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds until then, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def within(self, seconds: float) -> Deadline:
        """Return the earlier of this one and ``seconds`` from now."""
        return Deadline(min(seconds, self.left()))


@dataclass(frozen=True)
class Plan:
    """The measurements of a server.

    Attributes:
        first_token: lengths of prompts whose time to the first token is measured.
        concurrency: numbers of requests that are decoded together.
        prompt: tokens of their prompts.
        output: tokens of their answers.
        long: pairs of (number of requests, tokens of a prompt).
        long_output: tokens of their answers.
        repeats: times that each figure is measured; the median counts.
        step_seconds: limit for one step.
        seed: of the prompts.
    """

    first_token: Sequence[int] = (1024, 8192)
    concurrency: Sequence[int] = (1, 16, 64)
    prompt: int = 128
    output: int = 256
    long: Sequence[tuple[int, int]] = ((32, 8000),)
    long_output: int = 128
    repeats: int = 3
    step_seconds: float = 60.0
    seed: int = 0

    @property
    def most_requests(self) -> int:
        """The largest number of requests at a time."""
        return max([1, *self.concurrency, *(count for count, _ in self.long)])


@dataclass(frozen=True)
class Answers:
    """The answers to requests sent together.

    Attributes:
        seconds: from the first request sent to the last answer.
        cached: prompt tokens that the server had from earlier requests, all together.
    """

    seconds: float
    cached: int


class Load:
    """Requests to the server at ``port`` of this machine.

    Args:
        port: of the server.
        vocabulary: token ids are below it.
        seed: of the prompts.
        threads: the most requests at a time.
    """

    def __init__(self, port: int, vocabulary: int, seed: int, threads: int) -> None:
        self.port = port
        self.vocabulary = vocabulary
        self.seed = seed
        self._pool = ThreadPoolExecutor(threads)

    def close(self) -> None:
        """End the threads; requests under way end with their timeouts."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def prompts(self, name: str, count: int, length: int) -> list[list[int]]:
        """Return ``count`` prompts of ``length`` random tokens, always the same for ``name``."""
        generator = random.Random(f"{self.seed} {name}")
        # The first few ids are begin and end of text in most vocabularies.
        return [[generator.randrange(4, self.vocabulary) for _ in range(length)] for _ in range(count)]

    def ask(self, prompts: Sequence[Sequence[int]], output: int, deadline: Deadline) -> Answers:
        """Send all prompts at once and wait for ``output`` tokens to each.

        Raises:
            TimeoutError: the deadline has passed.
            ModelOptExtError: a request failed, or its answer has another number of tokens.
        """
        # Greedy, and encoded before the clock runs.
        sampling = {"temperature": 0.0, "max_new_tokens": output, "ignore_eos": True}
        bodies = [json.dumps({"input_ids": list(ids), "sampling_params": sampling}).encode() for ids in prompts]
        if deadline.left() <= 0:
            raise TimeoutError
        began = time.perf_counter()
        futures = [self._pool.submit(self._post, "/generate", body, deadline.left()) for body in bodies]
        texts = [future.result() for future in futures]
        seconds = time.perf_counter() - began
        answers = [json.loads(text)["meta_info"] for text in texts]
        short = next((info for info in answers if info["completion_tokens"] != output), None)
        if short is not None:
            raise ModelOptExtError.at("/generate", "completion_tokens", str(output), short["completion_tokens"])
        return Answers(seconds, sum(info.get("cached_tokens", 0) for info in answers))

    def flush(self) -> None:
        """Forget the prefixes of earlier requests, once these have ended."""
        self._post(f"/flush_cache?timeout={FLUSH_SECONDS:.0f}", b"{}", FLUSH_SECONDS + 5.0)

    def abort(self) -> None:
        """End every request that is under way."""
        self._post("/abort_request", b'{"abort_all": true}', FLUSH_SECONDS)

    def post(self, path: str, payload: dict[str, Any], timeout: float) -> bytes:
        """Send JSON and return the answer. Raises ModelOptExtError and TimeoutError."""
        return self._post(path, json.dumps(payload).encode(), timeout)

    def _post(self, path: str, body: bytes, timeout: float) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=max(timeout, 0.001))
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise ModelOptExtError.at(f"port {self.port}", path, "an answer", repr(error)) from error
        finally:
            connection.close()
        if response.status != 200:
            got = f"{response.status} {text[:200].decode('utf-8', errors='replace')}"
            raise ModelOptExtError.at(f"port {self.port}", path, "HTTP 200", got)
        return text


@dataclass(frozen=True)
class Step:
    """One measurement: a name, and a function of its deadline that returns figures by name."""

    name: str
    measure: Callable[[Deadline], dict[str, float]]


def first_token_name(length: int) -> str:
    """Return the name of a time to the first token."""
    return f"TTFT, {length} tokens (ms)"


def decode_name(count: int, length: int) -> str:
    """Return the name of a decode rate."""
    return f"decode, {count} x {length} (tok/s)"


def prefill_name(count: int, length: int) -> str:
    """Return the name of a prefill rate."""
    return f"prefill, {count} x {length} (tok/s)"


def steps(load: Load, plan: Plan) -> Iterator[Step]:
    """Yield the measurements of a plan in order."""
    for length in plan.first_token:
        yield Step(first_token_name(length), functools.partial(_first_token, load, plan, length))
    for count in plan.concurrency:
        yield Step(decode_name(count, plan.prompt), functools.partial(_decode, load, plan, count))
    for count, length in plan.long:
        yield Step(decode_name(count, length), functools.partial(_long, load, plan, count, length))


def warm_up(load: Load, plan: Plan, deadline: Deadline) -> None:
    """Send requests of other prompts in the sizes of the plan, so that nothing is compiled while it is measured."""
    for length in plan.first_token:
        load.ask(load.prompts(f"warm-up {length}", 1, length), 1, deadline)
    for count in plan.concurrency:
        load.ask(load.prompts(f"warm-up {count}", count, plan.prompt), 4, deadline)
    load.flush()


def _first_token(load: Load, plan: Plan, length: int, deadline: Deadline) -> dict[str, float]:
    """Return the time of one request for one token: the median over different prompts."""
    prompts = load.prompts(f"first token {length}", plan.repeats + 2, length)
    seconds = [load.ask([prompt], 1, deadline).seconds for prompt in prompts]
    load.flush()
    return {first_token_name(length): 1e3 * statistics.median(seconds)}


def _decode(load: Load, plan: Plan, count: int, deadline: Deadline) -> dict[str, float]:
    """Return the rate of requests that decode together."""
    prompts = load.prompts(f"decode {count}", count, plan.prompt)
    load.ask(prompts, 1, deadline)
    rate = _decode_rate(load, prompts, plan.output, plan.repeats, deadline)
    load.flush()
    return {decode_name(count, plan.prompt): rate}


def _long(load: Load, plan: Plan, count: int, length: int, deadline: Deadline) -> dict[str, float]:
    """Return the rates of prefill, measured once, and of decode after it."""
    prompts = load.prompts(f"long {count} {length}", count, length)
    prefill = load.ask(prompts, 1, deadline)
    rate = _decode_rate(load, prompts, plan.long_output, plan.repeats, deadline)
    load.flush()
    return {prefill_name(count, length): count * length / prefill.seconds, decode_name(count, length): rate}


def _decode_rate(load: Load, prompts: list[list[int]], output: int, repeats: int, deadline: Deadline) -> float:
    """Return the tokens a second behind cached prompts, from the time of ``output`` tokens less that of one token.

    Raises:
        ModelOptExtError: the server's cache does not hold the prompts, so that prefill would be in the time; or the answers
            are too short for a rate.
    """
    tokens = sum(len(prompt) for prompt in prompts)
    rates = []
    for _ in range(repeats):
        first = load.ask(prompts, 1, deadline)
        whole = load.ask(prompts, output, deadline)
        cached = min(first.cached, whole.cached)
        if tokens - cached > UNCACHED_TOKENS * len(prompts):
            raise ModelOptExtError.at("decode rate", "cached tokens", f"about {tokens}", cached)
        if whole.seconds <= first.seconds:
            got = f"{whole.seconds:.4f} s, {first.seconds:.4f} s for one"
            raise ModelOptExtError.at("decode rate", f"{output} tokens", "more time than one token takes", got)
        rates.append(len(prompts) * (output - 1) / (whole.seconds - first.seconds))
    return statistics.median(rates)
