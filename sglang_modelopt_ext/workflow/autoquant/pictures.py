"""The pictures of a search: sensitivity and choice by layer, and bits against perplexity."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant.state import UNQUANTIZED, Group, Report, Result, State

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
_UNQUANTIZED_COLOUR = "#bbbbbb"


def matplotlib_figure() -> Any:
    """matplotlib's Figure, which needs no display. Raises ModelOptExtError where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModelOptExtError.at(
            "matplotlib", "import", "matplotlib for the pictures (pip install 'sglang-modelopt-ext[quantize]')", error
        ) from error
    return Figure


def short_name(group: Group) -> tuple[str, str]:
    """The kind of a group and its place among its kind: ``("self_attn q+k+v", "12")``."""
    leaves = "+".join(layer.name.rpartition(".")[2].removesuffix("_proj") for layer in group.layers)
    parent = group.layers[0].name.rpartition(".")[0]
    match = _LAYER.match(parent)
    if match is None:
        return f"{parent} {leaves}".strip(), ""
    return f"{match.group(3)} {leaves}", match.group(2)


def draw(folder: Path, report: Report) -> list[Path]:
    """Writes the pictures into ``folder``; the trade-off only where there are two measured targets or more."""
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
    formats = [row.name for row in state.formats]
    palette = dict(zip(formats, (_COLOURS[i % len(_COLOURS)] for i in range(len(formats))), strict=True))
    palette[UNQUANTIZED] = _UNQUANTIZED_COLOUR
    scores = [c.score for g in state.groups for n, c in g.candidates.items() if n != UNQUANTIZED and c.score is not None and c.score > 0]
    low, high = (min(scores), max(scores)) if scores else (1.0, 1.0)
    norm = LogNorm(max(low, high * 1e-9), high if high > low else high * 10)

    widths = [max(len(members), 3) for members in kinds.values()]
    cell = max(0.22, min(0.5, 24 / sum(widths)))
    rows = len(formats), max(len(results), 1)
    figure = matplotlib_figure()(
        figsize=(3.2 + cell * sum(widths) + 0.3 * len(kinds), 2.2 + 0.42 * sum(rows)), layout="constrained"
    )
    axes = figure.subplots(2, len(kinds), squeeze=False, width_ratios=widths, height_ratios=rows, sharey="row")
    image = None
    for column, (kind, members) in enumerate(kinds.items()):
        top, bottom = axes[0][column], axes[1][column]
        table = np.full((len(formats), len(members)), np.nan)
        for x, (_, group) in enumerate(members):
            for y, name in enumerate(formats):
                candidate = group.candidates.get(name)
                if candidate is not None and candidate.score is not None:
                    table[y, x] = max(candidate.score, norm.vmin)
        image = top.imshow(table, aspect="auto", cmap="viridis_r", norm=norm, interpolation="nearest")
        top.set_title(kind, fontsize=9)
        top.set_facecolor("#eeeeee")
        codes = np.array(
            [
                [[*formats, UNQUANTIZED].index(result.choice.formats[group.name]) for _, group in members]
                for result in results
            ]
        ).reshape(len(results), len(members))
        colours = ListedColormap([palette[name] for name in [*formats, UNQUANTIZED]])
        bottom.imshow(codes, aspect="auto", cmap=colours, vmin=-0.5, vmax=len(formats) + 0.5, interpolation="nearest")
        every = max(1, -(-len(members) // max(1, round(len(members) * cell / 0.25))))
        ticks = list(range(0, len(members), every))
        for axis in (top, bottom):
            axis.set_xticks(ticks, [members[tick][0] for tick in ticks], fontsize=7)
            axis.set_xticks(np.arange(-0.5, len(members)), minor=True)
            axis.grid(which="minor", color="white", linewidth=0.8)
            axis.tick_params(which="minor", length=0)
        bottom.set_yticks(np.arange(-0.5, len(results)), minor=True)
        bottom.set_xlabel("layer", fontsize=8)
    axes[0][0].set_yticks(
        range(len(formats)), [f"{row.name.removesuffix('_CFG')}  {row.bits:g} b" for row in state.formats], fontsize=8
    )
    labels = [f"target {result.choice.target:g}: {result.choice.bits:.3f} b" for result in results]
    axes[1][0].set_yticks(range(len(results)), labels, fontsize=8)
    what = "squared gradient x change" if state.method == "gradient" else "KL, nats"
    figure.colorbar(image, ax=axes[0].tolist(), label=f"sensitivity ({what})", pad=0.01)
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
    figure = matplotlib_figure()(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    points = sorted((_bits(result), result.measured.perplexity or 0.0, result.choice.target) for result in measured)
    axis.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", color=_COLOURS[0])
    for x, y, target in points:
        axis.annotate(f"target {target:g}", (x, y), textcoords="offset points", xytext=(6, 6), fontsize=8)
    if report.unquantized_perplexity is not None:
        label = f"unquantized ({report.state.unquantized_bits} bits): {report.unquantized_perplexity:.4g}"
        axis.axhline(report.unquantized_perplexity, color=_COLOURS[1], linestyle="--", label=label)
        axis.legend(fontsize=8)
    axis.margins(x=0.15, y=0.15)
    stored = all(result.measured.stored_bits is not None for result in measured)
    axis.set_xlabel(
        "bits for each weight, measured from the stored bytes" if stored else "bits for each weight, by cost"
    )
    axis.set_ylabel("perplexity of the fake-quantized model")
    tokens = "" if report.held_out is None else f", {report.held_out.tokens} held-out tokens"
    axis.set_title(f"{Path(report.state.model).name}{tokens}", fontsize=10)
    axis.grid(alpha=0.3)
    return figure


def _bits(result: Result) -> float:
    return result.choice.bits if result.measured.stored_bits is None else result.measured.stored_bits
