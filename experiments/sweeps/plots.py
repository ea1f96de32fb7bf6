"""Pictures of a sweep: curves with bands over seeds, and errors with their deviations."""

from __future__ import annotations

import dataclasses
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.show.formats import Estimate
from experiments.sweeps.sweep import Result

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Paul Tol's bright scheme: told apart by colour-blind readers and in print."""


def plot_curves(
    panels: Sequence[tuple[str, Sequence[tuple[str, Result]]]], title: str, path: pathlib.Path
) -> None:
    """Draws training loss and validation accuracy over the epochs, a column for each panel.

    A line is the mean over the seeds, and its band reaches from the least to the greatest.

    Args:
      panels: of each, the title, and the labelled results to compare in it.
      title: of the picture.
      path: of the PNG file.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(2.9 * len(panels) + 0.8, 5.2), layout="constrained")
    axes = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False)
    for column, (name, results) in enumerate(panels):
        for (label, result), color in zip(results, _cycle(len(results)), strict=True):
            _bands(axes[0, column], result, "train_loss", 1, _legend(label, result), color)
            _bands(axes[1, column], result, "validation_accuracy", 100, None, color)
        axes[0, column].set_title(textwrap.fill(name, 34), fontsize=9)
        axes[1, column].set_xlabel("epoch")
        axes[0, column].legend(fontsize=7)
        axes[1, column].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_yscale("log")  # one run that diverged would flatten all others
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("training cross-entropy (nats)")
    axes[1, 0].set_ylabel("validation accuracy (%)")
    for each in axes.flat:
        each.grid(alpha=0.3)
    figure.suptitle(_wrapped(f"{title}: mean, least and greatest over seeds", figure), fontsize=10)
    figure.savefig(path, dpi=130)


def _legend(label: str, result: Result) -> str:
    # A rate that was given stands in the label.
    rate = f", rate {result.rate:g}" if result.group.rates and result.rate is not None else ""
    return f"{label}{rate} (n = {len(result.summaries)})"


def _bands(
    axes: Any, result: Result, name: str, factor: float, label: str | None, color: str
) -> None:
    if not result.histories:
        axes.plot([], [], label=label, color=color)
        return
    values = np.array([[factor * line[name] for line in h] for h in result.histories.values()])
    epochs = np.arange(1, values.shape[1] + 1)
    marker = "o" if len(epochs) < 20 else ""
    axes.plot(epochs, values.mean(0), label=label, color=color, marker=marker, markersize=2.5)
    axes.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of :func:`plot_intervals`.

    Attributes:
      group: the rows of a group stand together, under its name.
      name: of the row.
      error: test error in %, mean and deviation; of no values where there is none.
      columns: what stands beside the row, by the column's title, such as a cost.
    """

    group: str
    name: str
    error: Estimate
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)


def plot_intervals(
    rows: Sequence[Row], title: str, path: pathlib.Path, reference: str | None = None
) -> None:
    """Draws test errors with their deviations, a line for each row, group by group.

    In each group the least error stands first. The error is on a logarithmic axis.

    Args:
      rows: groups appear in the order of their first row.
      title: of the picture.
      path: of the PNG file.
      reference: rows of this name are drawn in a colour of their own, and a line marks their error.

    Raises:
      ValueError: there are no rows.
    """
    import matplotlib.figure

    if not rows:
        raise ValueError("there are no rows to draw.")
    lines = _lines(rows)
    figure = matplotlib.figure.Figure(figsize=(8.6, 0.9 + 0.2 * len(lines)), layout="constrained")
    axes = figure.subplots()
    columns = list(dict.fromkeys(name for row in rows for name in row.columns))
    for place, column in enumerate(columns):
        _beside(axes, place, len(lines), column, "#555555")
    heights = range(len(lines) - 1, -1, -1)
    for height, line in zip(heights, lines, strict=True):
        if not isinstance(line, Row):
            axes.axhspan(height - 0.5, height + 0.5, color="#eeeeee", linewidth=0, zorder=0)
            continue
        _draw(axes, height, line, COLORS[1] if line.name == reference else COLORS[0])
        for place, column in enumerate(columns):
            _beside(axes, place, height, line.columns.get(column, ""), "black")
    for error in {row.error.mean for row in rows if row.name == reference and row.error.n}:
        axes.axvline(max(error, _LEAST), color=COLORS[1], lw=0.8, linestyle=":", zorder=0.5)
    axes.set_yticks(heights, [line.name if isinstance(line, Row) else line for line in lines])
    for tick, line in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set(fontsize=8, fontweight="normal" if isinstance(line, Row) else "bold")
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(-0.7, len(lines) - 0.3), xscale="log", xlabel="test error (%)")
    _number_ticks(axes.xaxis)
    axes.grid(alpha=0.3, axis="x", which="both")
    figure.suptitle(_wrapped(title, figure), fontsize=10)
    figure.savefig(path, dpi=130)


_LEAST = 0.05
"""An error on a logarithmic axis, in %, that stands for zero."""

_SMALL: dict[str, Any] = {"fontsize": 8, "va": "center"}


def _lines(rows: Sequence[Row]) -> list[Row | str]:
    """The rows as they are drawn, under the names of their groups."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    lines: list[Row | str] = []
    for group, own in groups.items():
        own.sort(key=lambda row: row.error.mean if row.error.n else float("inf"))
        lines += [group, *own]
    return lines


def _draw(axes: Any, height: float, row: Row, color: str) -> None:
    """The mean of a row, with whiskers that end above zero."""
    if not row.error.n:
        axes.text(0.01, height, "no run finished", transform=_across(axes), **_SMALL)
        return
    error = max(row.error.mean, _LEAST)
    whiskers = None
    if row.error.n > 1:
        up = row.error.deviation
        whiskers = [[min(up, 0.9 * error)], [up]]
    axes.errorbar(error, height, xerr=whiskers, fmt="o", color=color, markersize=4.5, capsize=2)


def _across(axes: Any) -> Any:
    """Coordinates of the picture across, of the rows up and down."""
    return axes.get_yaxis_transform()


def _beside(axes: Any, column: int, height: float, text: str, color: str) -> None:
    place = 1.11 + 0.13 * column
    axes.text(place, height, text, ha="right", transform=_across(axes), color=color, **_SMALL)


def _number_ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _wrapped(text: str, figure: Any) -> str:
    """The text in lines that fit the figure's width at 10 points."""
    return textwrap.fill(text, int(11 * figure.get_size_inches()[0]))


def _cycle(n: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(n)]
