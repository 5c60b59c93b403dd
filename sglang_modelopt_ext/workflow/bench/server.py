"""One option measured: its server is started, loaded, profiled if wished, and ended."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.bench.load import Deadline, Load, Plan, Step, steps, warm_up
from sglang_modelopt_ext.workflow.bench.options import Option
from sglang_modelopt_ext.workflow.bench.profile import Profile, capture
from sglang_modelopt_ext.workflow.server.client import vocabulary_size
from sglang_modelopt_ext.workflow.server.process import ServerProcess

START, WEIGHTS, CACHE, TOKENS = "start (s)", "weights (GiB)", "KV cache (GiB)", "KV cache (tokens)"
START_SECONDS = 300.0
LEAST_SECONDS = 1.0
"""A step is not begun with less of the budget left."""
_SERVED = re.compile(r"modelopt_ext: (.*(?: kernel |left to SGLang).*)")


@dataclass
class Result:
    """The figures and problems of an option.

    Attributes:
        name: of the option.
        command: of the server.
        environment: variables that the option sets.
        figures: by name, with their units in it.
        served: lines of its log that say who computes which layers.
        problems: figures that were not measured, with the reason.
        profile: of a decode step, None where none was taken.
    """

    name: str
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    served: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    profile: Profile | None = None

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """Settings that all options share.

    Attributes:
        plan: the load.
        arguments: further ones of every server.
        logs: the folder for the servers' logs, and for traces.
        profile: requests of the profiled decode step, None for no profile.
        say: prints a line of progress.
    """

    plan: Plan
    arguments: Sequence[str]
    logs: Path
    profile: int | None
    say: Callable[[str], None]


def measure(option: Option, model: Path, settings: Settings, deadline: Deadline, result: Result) -> None:
    """Measure an option until the deadline and fill ``result``; a failure ends in its problems, not in an exception."""
    if deadline.left() < LEAST_SECONDS:
        result.problems.append("not started, the budget is spent")
        return
    server = _server(option, model, settings, deadline)
    result.command = server.command
    began = time.monotonic()
    with _failures_of(result, settings), server:
        result.figures[START] = time.monotonic() - began
        _ready(server, result, settings, began)
        _drive(server, result, settings, deadline)


def measure_together(
    options: Sequence[Option],
    models: Mapping[str, Path],
    settings: Settings,
    deadline: Deadline,
    results: Sequence[Result],
    measured: Callable[[], None],
) -> None:
    """Start the servers of all options at once, and measure one after another when all of them wait for requests.

    A server that waits leaves the GPU alone, and is ended when it is measured. All of them must fit its memory: their arguments
    have to bound their caches (``--max-total-tokens``). Results have no time of a start, since servers that start together slow
    each other, and no size of weights, which SGLang takes for the memory that went away meanwhile.

    Args:
        options: what to measure.
        models: the checkpoint of each option, by its name.
        settings: what all servers share.
        deadline: for all of it.
        results: of each option; filled.
        measured: called when an option is done.
    """
    began = time.monotonic()
    with contextlib.ExitStack() as running:
        servers = []
        for option, result in zip(options, results, strict=True):
            server = _server(option, models[option.name], settings, deadline)
            result.command = server.command
            running.callback(server.stop)
            server.start()
            servers.append(server)
        for server, result in zip(servers, results, strict=True):
            with _failures_of(result, settings):
                server.wait_until_ready()
                _ready(server, result, settings, began)
                del result.figures[WEIGHTS]
        for server, result in zip(servers, results, strict=True):
            if not result.problems:
                with _failures_of(result, settings):
                    _drive(server, result, settings, deadline)
            server.stop()
            measured()


@contextlib.contextmanager
def _failures_of(result: Result, settings: Settings) -> Iterator[None]:
    """Turn an error into a problem of ``result``."""
    try:
        yield
    except ModelOptExtError as error:
        result.problems.append(str(error))
        settings.say(f"{result.name}: {error}")


def _ready(server: ServerProcess, result: Result, settings: Settings, began: float) -> None:
    """Record what a server that began at ``began`` says of itself."""
    result.figures |= memory(server.server_info())
    result.served = served_by(server.log.read_text(encoding="utf-8", errors="replace"))
    settings.say(f"{result.name}: ready after {time.monotonic() - began:.0f} s")


def memory(info: dict[str, Any]) -> dict[str, float]:
    """Return the figures of memory out of the answer to ``/server_info``: of one rank."""
    usage = info["internal_states"][0]["memory_usage"]
    return {WEIGHTS: usage["weight"], CACHE: usage["kvcache"], TOKENS: usage["token_capacity"]}


def served_by(log: str) -> list[str]:
    """Return the lines of this package in a server's log that say who computes which layers."""
    return list(dict.fromkeys(match.group(1).strip() for match in _SERVED.finditer(log)))


def _server(option: Option, model: Path, settings: Settings, deadline: Deadline) -> ServerProcess:
    most = str(max(settings.plan.most_requests, settings.profile or 1))
    arguments = ["--skip-tokenizer-init", "--random-seed", "0", "--max-running-requests", most]
    arguments += ["--cuda-graph-max-bs-decode", most, *option.arguments, *settings.arguments]
    environment = {"HF_HUB_OFFLINE": "1", **option.environment}
    if settings.profile:
        # Decode is profiled from the first step on that has all requests.
        environment["SGLANG_PROFILE_BY_STAGE_DECODE_MIN_BS"] = str(settings.profile)
    return ServerProcess(
        model,
        log=settings.logs / f"{Path(option.name).name}.log",
        arguments=arguments,
        environment=environment,
        timeout=min(START_SECONDS, deadline.left()),
        progress=False,
    )


def _drive(server: ServerProcess, result: Result, settings: Settings, deadline: Deadline) -> None:
    """Warm up, take every step of the plan and the profile; problems go into ``result``."""
    plan = settings.plan
    load = Load(server.port, vocabulary_size(server.model), plan.seed, max(plan.most_requests, settings.profile or 1))

    def warm(limit: Deadline) -> dict[str, float]:
        warm_up(load, plan, limit)
        return {}

    def profile(limit: Deadline) -> dict[str, float]:
        folder = (settings.logs / f"trace-{Path(result.name).name}").resolve()
        result.profile = capture(load, server.model, settings.profile or 1, folder, limit)
        return {}

    every = [Step("warm-up", warm), *steps(load, plan)]
    if settings.profile:
        every.append(Step("profile", profile))
    try:
        for step in every:
            _take(step, load, result, settings, deadline)
    except ModelOptExtError:
        # Where the server is gone, its own error has the end of its log.
        server.server_info()
        raise
    finally:
        load.close()


def _take(step: Step, load: Load, result: Result, settings: Settings, deadline: Deadline) -> None:
    """Take one step. Raises ModelOptExtError when the server does not answer any more."""
    if deadline.left() < LEAST_SECONDS:
        result.problems.append(f"{step.name}: not measured, the budget is spent")
        return
    limit = deadline.within(settings.plan.step_seconds)
    seconds = limit.left()
    try:
        figures = step.measure(limit)
    except TimeoutError:
        result.problems.append(f"{step.name}: stopped after {seconds:.0f} s")
        settings.say(f"{result.name}: {result.problems[-1]}")
    except ModelOptExtError as error:
        result.problems.append(f"{step.name}: {error}")
        settings.say(f"{result.name}: {result.problems[-1]}")
    else:
        result.figures |= figures
        for name, value in figures.items():
            settings.say(f"{result.name}: {name}: {value:.1f}")
        return
    try:
        load.abort()
        load.flush()
    except TimeoutError as error:
        raise ModelOptExtError.at(result.name, "server", "to be idle after an abort", "no answer") from error
