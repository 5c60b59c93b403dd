"""Plots of measurements, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.evaluate.score import Interval


def find_pyplot() -> Any:
    """Return matplotlib's pyplot, drawing to files only. Raises ModelOptExtError where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ModelOptExtError.at(
            "matplotlib", "import", "the package matplotlib (pip install 'sglang-modelopt-ext[evaluate]')", error
        ) from error
    return pyplot


def plot_intervals(panels: Sequence[tuple[str, Sequence[str], Sequence[Interval]]], title: str, file: Path) -> None:
    """Plot one panel for each measure with one line for each checkpoint: the value and its interval.

    Args:
        panels: for each panel the measure's name, the checkpoints' names and their intervals.
        title: of the plot.
        file: a ``.png`` file to write.

    Raises:
        ModelOptExtError: no matplotlib, or a file that cannot be written.
    """
    pyplot = find_pyplot()
    rows = max(len(names) for _, names, _ in panels)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 1.6 + 0.4 * rows), squeeze=False)
    for axis, (measure, names, intervals) in zip(axes[0], panels, strict=True):
        for row, interval in enumerate(intervals):
            error = [[interval.value - interval.low], [interval.high - interval.value]]
            axis.errorbar(interval.value, row, xerr=error, fmt="o", capsize=4, color="tab:blue")
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel(measure)
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="png", dpi=120)
    except OSError as error:
        raise ModelOptExtError.at(file, "--plot", "a file that can be written", error) from error
    finally:
        pyplot.close(figure)
