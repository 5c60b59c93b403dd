"""The speed that users feel, of SGLang servers one after another: run ``python -m benchmarks.serving OPTION ...``.

An option is a recipe, served from a model of ``--shape`` with random weights that is written to ``--models`` first, or a
checkpoint's folder; variants follow behind ``+``, such as ``nvfp4+fp8math`` or ``bf16+kv-nvfp4``. Measured are the start, memory,
the time to the first token, decode rates, long prompts, and with ``--profile`` the kernels of a decode step. Arguments after ``--``
go to every server.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import signal
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from benchmarks.serving import report
from benchmarks.serving.load import Deadline, Plan
from benchmarks.serving.machine import apart, hardware, has_gpu, versions
from benchmarks.serving.models import SHAPES, make_models, model_folder
from benchmarks.serving.options import RECIPES, VARIANTS, Option, parse_option
from benchmarks.serving.server import Result, Settings, measure
from sglang_modelopt_ext.errors import ModelOptExtError

FOLDER = Path(".serving")
"""Where files go by default."""


def parse_long(text: str) -> tuple[int, int]:
    """Read ``NxTOKENS``."""
    count, _, tokens = text.partition("x")
    return int(count), int(tokens)


def parse_arguments(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments, and those behind ``--``, which are the servers'."""
    split = list(words).index("--") if "--" in words else len(words)
    plan = Plan()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "options",
        nargs="+",
        metavar="OPTION",
        help=f"{', '.join(RECIPES)} or a folder, and variants: {', '.join('+' + name for name in VARIANTS)}",
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="sizes of the models (default: 8b)")
    parser.add_argument("--models", type=Path, default=FOLDER / "models", help="where models are kept")
    parser.add_argument("--baseline", help="the option that ratios refer to (default: the first)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="end after this time with what is known then")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page in Markdown")
    parser.add_argument("--json", type=Path, default=FOLDER / "serving.json", help="where results are written")
    parser.add_argument("--logs", type=Path, default=FOLDER / "logs", help="servers' logs and traces")
    parser.add_argument(
        "--profile", type=int, nargs="?", const=1, metavar="N", help="profile a decode step of N requests (default: 1)"
    )
    parser.add_argument("--first-token", type=int, nargs="*", default=plan.first_token, metavar="TOKENS")
    parser.add_argument("--concurrency", type=int, nargs="*", default=plan.concurrency, metavar="N")
    parser.add_argument("--prompt", type=int, default=plan.prompt, metavar="TOKENS")
    parser.add_argument("--output", type=int, default=plan.output, metavar="TOKENS")
    parser.add_argument("--long", type=parse_long, nargs="*", default=plan.long, metavar="NxTOKENS")
    parser.add_argument("--long-output", type=int, default=plan.long_output, metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=plan.repeats, metavar="N")
    parser.add_argument("--step-seconds", type=float, default=plan.step_seconds, help="limit for one measurement")
    parser.add_argument("--seed", type=int, default=plan.seed)
    return parser.parse_args(words[:split]), list(words[split + 1 :])


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return the load of the arguments. Raises ModelOptExtError for answers too short to have a rate."""
    for name in ("output", "long_output"):
        if getattr(arguments, name) < 2:
            raise ModelOptExtError.at(
                "command line", f"--{name}".replace("_", "-"), "2 or more", getattr(arguments, name)
            )
    names = ("first_token", "concurrency", "prompt", "output", "long", "long_output", "repeats", "step_seconds", "seed")
    return Plan(**{name: getattr(arguments, name) for name in names})


def describe_load(plan: Plan) -> str:
    """Return sentences that define the figures."""
    return (
        f"Prompts are random token ids (seed {plan.seed}); decode N x P: N requests of P tokens whose prefixes are cached, "
        f"{plan.output} tokens out ({plan.long_output} for long prompts), the time of the first token taken off; "
        f"medians of {plan.repeats} (of {plan.repeats + 2} for TTFT; prefill is measured once)."
    )


def prepare(options: Sequence[Option], shape: str, root: Path) -> tuple[str, dict[str, Path]]:
    """Write the models that are missing; return the hardware and the checkpoint of each option."""
    recipes = list(dict.fromkeys(option.recipe for option in options if option.recipe is not None))
    missing = [recipe for recipe in recipes if not model_folder(root, shape, recipe).is_dir()]
    if missing:
        apart(make_models, root, shape, missing)
    folders = {option.name: option.folder or model_folder(root, shape, option.recipe or "") for option in options}
    return apart(hardware), folders


def run(arguments: argparse.Namespace, extra: Sequence[str]) -> int:
    """Measure every option and print the table; return 1 when anything was not measured."""
    deadline = Deadline(arguments.budget)
    options = [parse_option(text) for text in arguments.options]
    baseline = arguments.baseline or options[0].name
    if baseline not in {option.name for option in options}:
        raise ModelOptExtError.at("command line", "--baseline", f"one of {', '.join(arguments.options)}", baseline)
    if arguments.profile and not has_gpu():
        raise ModelOptExtError.at("command line", "--profile", "a GPU, whose kernels are recorded", "none")
    plan = plan_of(arguments)
    date = datetime.date.today().isoformat()
    device, folders = prepare(options, arguments.shape, arguments.models)
    command = "python -m benchmarks.serving " + shlex.join(sys.argv[1:])
    about = report.Run(date, device, versions(), arguments.shape, command, baseline, describe_load(plan))

    def say(line: str) -> None:
        print(line, flush=True)

    settings = Settings(plan, extra, arguments.logs, arguments.profile, say)
    results: list[Result] = []
    # Also what is known when a signal or an error ends the run.
    try:
        for option in options:
            results.append(Result(option.name, environment=option.environment))
            try:
                measure(option, folders[option.name], settings, deadline, results[-1])
            except BaseException:
                results[-1].problems.append("ended by a signal or an error")
                raise
            finally:
                report.write(about, results, arguments.json, arguments.report)
    finally:
        say(report.as_text(about, results))
    return int(any(result.problems for result in results))


def main() -> int:
    """Run the command line; a signal to end it ends the server as well."""
    arguments, extra = parse_arguments(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(arguments, extra)
    except (ModelOptExtError, OSError, BrokenProcessPool) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
