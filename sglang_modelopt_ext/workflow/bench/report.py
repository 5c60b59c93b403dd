"""The table of a run, as text, as JSON and as a page in Markdown."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sglang_modelopt_ext.workflow.bench.profile import KernelTime, Profile
from sglang_modelopt_ext.workflow.bench.server import CACHE, Result

TOP_KERNELS = 20
LARGER_IS_BETTER = ("(tok/s)", "(tokens)")
NO_RATIO = frozenset({CACHE})
"""More of it is neither better nor worse: a server takes what is left of the memory."""
RATIO = "In brackets: times better than {}, above 1 faster, smaller, or with room for more tokens."


@dataclass(frozen=True)
class Run:
    """A run and where it was made.

    Attributes:
        date: ISO, of its beginning.
        hardware: the GPU or CPU.
        versions: of packages.
        shape: of the models.
        command: of the run.
        baseline: the option that ratios refer to.
        load: sentences that say what was measured.
    """

    date: str
    hardware: str
    versions: dict[str, str]
    shape: str
    command: str
    baseline: str
    load: str


def figure_names(results: Sequence[Result]) -> list[str]:
    """Return the names of all figures, in the order in which they were first measured."""
    return list(dict.fromkeys(name for result in results for name in result.figures))


def ratio(name: str, value: float, baseline: float | None) -> float | None:
    """Return how many times better a figure is than the baseline's, None where that cannot be said."""
    if name in NO_RATIO or not baseline or not value:
        return None
    return value / baseline if name.endswith(LARGER_IS_BETTER) else baseline / value


def cells(results: Sequence[Result], baseline: str) -> list[list[str]]:
    """Return the table: a header, and a row for each figure with a column for each option; ``-`` where none is known."""
    known = next((result.figures for result in results if result.name == baseline), {})
    rows = [["", *(result.name for result in results)]]
    for name in figure_names(results):
        row = [name]
        for result in results:
            value = result.figures.get(name)
            times = None if value is None or result.name == baseline else ratio(name, value, known.get(name))
            text = "-" if value is None else _number(value)
            row.append(text if times is None else f"{text} ({times:.2f})")
        rows.append(row)
    return rows


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        others = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def profile_cells(profile: Profile) -> tuple[list[list[str]], list[list[str]]]:
    """Return two tables of a profile: its groups, with the time in which no kernel runs, and its longest kernels."""
    header = ["launches a layer", "us", "MB", "TB/s", "share"]
    groups = [["group", *header], *(_profile_row(row, row.group, profile) for row in profile.groups())]
    idle = KernelTime("no kernel", "", 0, profile.idle)
    groups.append(_profile_row(idle, "no kernel", profile))
    kernels = [["kernel", "group", *header]]
    for row in profile.kernels[:TOP_KERNELS]:
        name, *rest = _profile_row(row, row.name[:70], profile)
        kernels.append([name, row.group, *rest])
    return groups, kernels


def _profile_row(row: KernelTime, name: str, profile: Profile) -> list[str]:
    size = "-" if row.bytes is None else f"{row.bytes / 1e6:.1f}"
    rate = "-" if row.bytes is None or not row.microseconds else f"{row.bytes / row.microseconds / 1e6:.2f}"
    launches, share = row.launches / profile.layers, row.microseconds / profile.microseconds
    return [name, f"{launches:.2f}", f"{row.microseconds:.1f}", size, rate, f"{100 * share:.1f} %"]


def profile_title(result: Result, profile: Profile) -> str:
    """Return the line above the tables of a profile."""
    what = f"a decode step of {profile.requests} request(s)"
    return f"{result.name}: {what}, {profile.microseconds:.0f} us, kernels as the mean of {profile.steps} steps"


def as_text(run: Run, results: Sequence[Result]) -> str:
    """Return everything for a terminal."""
    parts = [f"{run.hardware}; {run.shape}. {run.load}", aligned(cells(results, run.baseline))]
    parts.append(RATIO.format(run.baseline))
    parts += [f"{result.name}: {problem}" for result in results for problem in result.problems]
    for result in results:
        if result.profile is not None:
            tables = (aligned(table) for table in profile_cells(result.profile))
            parts += ["\n" + profile_title(result, result.profile), *tables]
    return "\n".join(parts)


def as_markdown(run: Run, results: Sequence[Result]) -> str:
    """Return a page with hardware, versions, the table, commands and profiles."""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    parts = [
        f"# Served speed: {run.shape}",
        f"{run.date}, {run.hardware}. {versions}.\n\nCommand: `{run.command}`",
        f"{run.load} Weights of recipes are random. {RATIO.format(run.baseline)}",
        markdown_table(cells(results, run.baseline)),
    ]
    problems = [f"- {result.name}: {problem}" for result in results for problem in result.problems]
    if problems:
        parts += ["## Not measured", "\n".join(problems)]
    served = [f"- {result.name}: {line}" for result in results for line in result.served]
    if served:
        parts += ["## Kernels, by the servers' logs", "\n".join(served)]
    for result in results:
        if result.profile is not None:
            parts += [
                f"## {profile_title(result, result.profile)}",
                *map(markdown_table, profile_cells(result.profile)),
            ]
    parts += ["## Servers", "```\n" + "\n".join(_server_line(result) for result in results if result.command) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _server_line(result: Result) -> str:
    variables = [f"{name}={shlex.quote(value)}" for name, value in result.environment.items()]
    return " ".join([*variables, "python", *map(shlex.quote, result.command[1:])])


def write(run: Run, results: Sequence[Result], json_file: Path | None, page: Path | None) -> None:
    """Write the JSON and the page where they are wished."""
    content = {"run": asdict(run), "results": [result.as_json() for result in results]}
    for file, text in ((json_file, json.dumps(content, indent=1) + "\n"), (page, as_markdown(run, results))):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
