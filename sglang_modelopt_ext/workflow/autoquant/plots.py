"""Plots of a search: sensitivity and choice by layer, and bits against perplexity."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant.state import MODEL_OF, UNQUANTIZED, Group, Report, Result, State

CHOICES, TRADE_OFF = "autoquant.png", "autoquant-perplexity.png"
_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.*)$")
_COLOURS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#ee8866",
    "#44bb99",
    "#882255",
    "#999933",
)
_COLUMNS = 64  # layers in one row of cells; a larger model gets several rows
_UNQUANTIZED_COLOUR = "#bbbbbb"


def matplotlib_figure() -> Any:
    """Return matplotlib's Figure, which needs no display. Raises ModelOptExtError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModelOptExtError.at(
            "matplotlib", "import", "matplotlib for the plots (pip install 'sglang-modelopt-ext[quantize]')", error
        ) from error
    return Figure


def short_name(group: Group) -> tuple[str, str]:
    """Return the kind of a group and its number among its kind: ``("self_attn q+k+v", "12")``."""
    leaves = "+".join(module.rpartition(".")[2].removesuffix("_proj") for module in group.modules)
    parent = group.layers[0].name.rpartition(".")[0]
    match = _LAYER.match(parent)
    if match is None:
        return f"{parent} {leaves}".strip(), ""
    return f"{match.group(3)} {leaves}", match.group(2)


def draw(folder: Path, report: Report) -> list[Path]:
    """Write the plots into ``folder``; the trade-off only with two or more measured targets."""
    figures = {CHOICES: _choices(report.state, report.results)}
    measured = [result for result in report.results if result.measured.perplexity is not None]
    if len(measured) > 1:
        figures[TRADE_OFF] = _trade_off(report, measured)
    for name, figure in figures.items():
        partial = folder / f".{name}.partial"
        figure.savefig(partial, format="png", dpi=130, bbox_inches="tight")
        partial.replace(folder / name)
    return [folder / name for name in figures]


def _choices(state: State, results: Sequence[Result]) -> Any:
    import numpy as np
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.patches import Patch

    kinds: dict[str, list[tuple[str, Group]]] = {}
    for group in state.groups:
        kind, place = short_name(group)
        kinds.setdefault(kind, []).append((place, group))
    # Skip layers without a choice, such as the lm_head.
    kinds = {kind: members for kind, members in kinds.items() if not all(group.excluded for _, group in members)}
    formats = [row.name for row in state.formats]
    palette = dict(zip(formats, (_COLOURS[i % len(_COLOURS)] for i in range(len(formats))), strict=True))
    palette[UNQUANTIZED] = _UNQUANTIZED_COLOUR
    scores = [
        c.score for group in state.groups for c in group.candidates.values() if c.score is not None and c.score > 0
    ]
    low, high = (min(scores), max(scores)) if scores else (1.0, 1.0)
    floor = max(low, high * 1e-9)
    norm = LogNorm(floor, high if high > low else high * 10)

    longest = max(len(members) for members in kinds.values())
    across = max(1, min(len(kinds), _COLUMNS // max(longest, 4)))
    down = -(-len(kinds) // across)
    cell = max(0.16, min(0.6, 20 / (across * max(longest, 4))))
    heights = [len(formats), max(len(results), 1)] * down
    size = (3.4 + across * (cell * max(longest, 4) + 0.3), 1.3 + 0.7 * down + 0.3 * sum(heights))
    figure = matplotlib_figure()(figsize=size, layout="constrained")
    axes = figure.subplots(2 * down, across, squeeze=False, height_ratios=heights)
    colours = ListedColormap([palette[name] for name in [*formats, UNQUANTIZED]])
    grid = {"edgecolors": "white", "linewidth": 0.8 if cell > 0.2 else 0.3}
    image = None
    for number, (kind, members) in enumerate(kinds.items()):
        row, column = 2 * (number // across), number % across
        table = np.full((len(formats), len(members)), np.nan)
        for x, (_, group) in enumerate(members):
            for y, name in enumerate(formats):
                candidate = group.candidates.get(name)
                if candidate is not None and candidate.score is not None:
                    table[y, x] = max(candidate.score, floor)
        codes = [
            [[*formats, UNQUANTIZED].index(result.choice.formats[group.name]) for _, group in members]
            for result in results
        ]
        top, bottom = axes[row][column], axes[row + 1][column]
        image = top.pcolormesh(table, cmap="viridis_r", norm=norm, **grid)
        bottom.pcolormesh(np.array(codes), cmap=colours, vmin=-0.5, vmax=len(formats) + 0.5, **grid)
        top.set_title(kind, fontsize=9)
        every = max(1, -(-len(members) // max(1, int(len(members) * cell / 0.22))))
        ticks = range(0, len(members), every)
        top.set_xticks([])
        bottom.set_xticks([tick + 0.5 for tick in ticks], [members[tick][0] for tick in ticks], fontsize=7)
        for axis, labels in (
            (top, [f"{row.name.removesuffix('_CFG')}  {row.bits:g} b" for row in state.formats]),
            (bottom, [f"target {result.choice.asked.name}: {result.choice.bits:.3f} b" for result in results]),
        ):
            axis.set_xlim(0, longest)  # equal cell sizes in all panels
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
            axis.set_yticks(np.arange(len(labels)) + 0.5, labels if column == 0 else [""] * len(labels), fontsize=8)
            axis.invert_yaxis()
    for left in range(len(kinds), across * down):
        axes[2 * (left // across)][left % across].set_axis_off()
        axes[2 * (left // across) + 1][left % across].set_axis_off()
    what = "squared gradient x change" if state.method == "gradient" else "KL, nats"
    bar = figure.colorbar(image, ax=axes.ravel().tolist(), pad=0.01, aspect=40)
    bar.set_label(f"sensitivity\n({what})", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    used = [name for name in [*formats, UNQUANTIZED] if any(name in r.choice.formats.values() for r in results)]
    figure.legend(
        handles=[
            Patch(color=palette[n], label=n.removesuffix("_CFG") if n != UNQUANTIZED else "unquantized") for n in used
        ],
        loc="outside lower center",
        ncols=min(len(used), 5),
        fontsize=8,
        frameon=False,
    )
    figure.suptitle(f"{Path(state.model).name}: sensitivity of every layer (top), chosen formats (bottom)", fontsize=10)
    return figure


def _trade_off(report: Report, measured: Sequence[Result]) -> Any:
    """Return the choices' perplexity over their bits and, where times were measured, over their time."""
    latency = report.state.latency
    timed = [result for result in measured if result.choice.us is not None] if latency is not None else []
    figure = matplotlib_figure()(figsize=(12.8 if timed else 6.4, 4.2), layout="constrained")
    axes = figure.subplots(1, 2 if timed else 1, squeeze=False, sharey=True)[0]
    _points(axes[0], report, [(_bits(result), result) for result in measured])
    stored = all(result.measured.stored_bits is not None for result in measured)
    axes[0].set_xlabel("bits per weight, measured from the stored bytes" if stored else "bits per weight, by cost")
    axes[0].set_ylabel(f"perplexity of the {MODEL_OF[report.state.scored_as]} model")
    if timed and latency is not None:
        _points(axes[1], report, [(result.choice.us or 0.0, result) for result in timed])
        axes[1].set_xlabel(f"us of the layers, {latency.tokens} tokens at a time, {latency.gpu}")
    tokens = "" if report.held_out is None else f", {report.held_out.tokens} held-out tokens"
    figure.suptitle(f"{Path(report.state.model).name}{tokens}", fontsize=10)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one is at or below in both coordinates, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _points(axis: Any, report: Report, results: Sequence[tuple[float, Result]]) -> None:
    found = [(x, result.measured.perplexity or 0.0) for x, result in results]
    axis.plot([x for x, _ in found], [y for _, y in found], "o", color=_COLOURS[0])
    front = pareto(found)
    axis.plot([x for x, _ in front], [y for _, y in front], "-", color=_COLOURS[0], label="best choices (Pareto)")
    for (x, y), (_, result) in zip(found, results, strict=True):
        label = f"target {result.choice.asked.name}"
        axis.annotate(label, (x, y), textcoords="offset points", xytext=(6, 6), fontsize=8)
    if report.unquantized_perplexity is not None:
        label = f"unquantized ({report.state.unquantized_bits} bits): {report.unquantized_perplexity:.4g}"
        axis.axhline(report.unquantized_perplexity, color=_COLOURS[1], linestyle="--", label=label)
    axis.legend(fontsize=8)
    axis.margins(x=0.15, y=0.15)
    axis.grid(alpha=0.3)


def _bits(result: Result) -> float:
    return result.choice.bits if result.measured.stored_bits is None else result.measured.stored_bits
