"""A run: SGLang servers of several recipes or checkpoints, measured one after another, started so or together."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.bench import report
from sglang_modelopt_ext.workflow.bench.load import Deadline, Plan
from sglang_modelopt_ext.workflow.bench.machine import apart, hardware, has_gpu, versions
from sglang_modelopt_ext.workflow.bench.models import SHAPES, make_models, model_folder
from sglang_modelopt_ext.workflow.bench.options import Option, parse_option
from sglang_modelopt_ext.workflow.bench.server import Result, Settings, measure, measure_together


@contextlib.contextmanager
def _written(unfinished: Sequence[Result], write: Callable[[], None]) -> Iterator[None]:
    """Write the results at the end, and where a signal or an error ends the measurement, say so in the ``unfinished`` ones."""
    try:
        yield
    except BaseException:
        for result in unfinished:
            result.problems.append("ended by a signal or an error")
        raise
    finally:
        write()


@dataclass(frozen=True)
class Request:
    """The servers to measure, and the places of files.

    Attributes:
        options: recipes and folders, with their variants.
        settings: what all servers share.
        shape: the sizes of the models of recipes.
        models: the folder that keeps these models.
        baseline: the option that ratios refer to, None for the first.
        budget: seconds for all of it, None without limit.
        together: whether all servers are started before the first is measured.
        dummy: whether servers draw weights of their own, so that no model is written.
        command: that was given, for the report.
        json_file: receives the results after each option; None for no file.
        page: receives a page in Markdown; None for no page.
    """

    options: Sequence[str]
    settings: Settings
    shape: str
    models: Path
    baseline: str | None = None
    budget: float | None = None
    together: bool = False
    dummy: bool = False
    command: str = ""
    json_file: Path | None = None
    page: Path | None = None


def describe_load(plan: Plan) -> str:
    """Return sentences that define the figures."""
    return (
        f"Prompts are random token ids (seed {plan.seed}); decode N x P: N requests of P tokens whose prefixes are cached, "
        f"{plan.output} tokens out ({plan.long_output} for long prompts), the time of the first token taken off; "
        f"medians of {plan.repeats} (of {plan.repeats + 2} for TTFT; prefill is measured once)."
    )


def prepare(options: Sequence[Option], shape: str, root: Path, dummy: bool = False) -> tuple[str, dict[str, Path]]:
    """Write the models that are missing, with ``dummy`` without weights; return the hardware and the checkpoint of each option."""
    recipes = list(dict.fromkeys(option.recipe for option in options if option.recipe is not None))
    missing = [recipe for recipe in recipes if not model_folder(root, shape, recipe, dummy).is_dir()]
    if missing:
        apart(make_models, root, shape, missing, dummy)
    folders = {
        option.name: option.folder or model_folder(root, shape, option.recipe or "", dummy) for option in options
    }
    return apart(hardware), folders


def run(request: Request) -> tuple[report.Run, list[Result]]:
    """Measure every option. What was not measured is in the problems of its result.

    Raises:
        ModelOptExtError: an option, the baseline or the load that cannot be measured.
    """
    settings = request.settings
    deadline = Deadline(request.budget)
    options = [parse_option(text) for text in request.options]
    baseline = request.baseline or options[0].name
    if baseline not in {option.name for option in options}:
        raise ModelOptExtError.at("command line", "--baseline", f"one of {', '.join(request.options)}", baseline)
    if request.dummy:
        if SHAPES[request.shape].experts:  # with dummy weights all tokens go to the same experts
            raise ModelOptExtError.at("command line", "--dummy", "a --shape without experts", request.shape)
        settings = replace(settings, arguments=[*settings.arguments, "--load-format", "dummy"])
    if settings.profile and not has_gpu():
        raise ModelOptExtError.at("command line", "--profile", "a GPU, whose kernels are recorded", "none")
    for name, tokens in (("--output", settings.plan.output), ("--long-output", settings.plan.long_output)):
        if tokens < 2:  # answers too short to have a rate
            raise ModelOptExtError.at("command line", name, "2 or more", tokens)
    date = datetime.date.today().isoformat()
    device, folders = prepare(options, request.shape, request.models, request.dummy)
    about = report.Run(date, device, versions(), request.shape, request.command, baseline, describe_load(settings.plan))
    results: list[Result] = []

    def write() -> None:
        report.write(about, results, request.json_file, request.page)

    try:
        if request.together:
            results += [Result(option.name, environment=option.environment) for option in options]
            unfinished = list(results)

            def measured() -> None:
                unfinished.pop(0)
                write()

            with _written(unfinished, write):
                measure_together(options, folders, settings, deadline, results, measured)
        else:
            for option in options:
                results.append(Result(option.name, environment=option.environment))
                with _written(results[-1:], write):
                    measure(option, folders[option.name], settings, deadline, results[-1])
    except BaseException:
        settings.say(report.as_text(about, results))  # what is known when a signal or an error ends the run
        raise
    return about, results
