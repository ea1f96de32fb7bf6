"""Pictures of a sweep: curves with bands over seeds, and errors with their deviations."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.show import style
from experiments.show.curves import Series, compare
from experiments.show.formats import Estimate
from experiments.sweeps.sweep import Result


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
    title = f"{title}: mean, least and greatest over seeds"
    size = (2.9 * len(panels) + 0.8, 5.2)
    with style.figure(2, len(panels), size=size, title=title, sharex=True, sharey="row") as drawing:
        figure, grid = drawing
        for (loss, accuracy), (name, results) in zip(grid.T, panels, strict=True):
            series = [
                Series(_legend(label, result), list(result.histories.values()), {"color": color})
                for (label, result), color in zip(results, itertools.cycle(style.COLORS))
            ]
            compare(loss, accuracy, series)
            loss.set_title(style.fill(name, 34))
            loss.legend()
        for each in grid.flat:
            each.label_outer()
        style.save(figure, path)


def _legend(label: str, result: Result) -> str:
    # A rate that was given stands in the label.
    rate = f", rate {result.rate:g}" if result.group.rates and result.rate is not None else ""
    return f"{label}{rate} (n = {len(result.summaries)})"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of :func:`plot_intervals`.

    Attributes:
      group: the rows of a group stand together, under its name.
      name: of the row.
      error: test error in %, mean and deviation; of no values where there is none.
      recipe: what gives the row its colour, with what was changed after a colon.
      columns: what stands beside the row, by the column's title, such as a cost.
    """

    group: str
    name: str
    error: Estimate
    recipe: str
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
      reference: rows of this name have a mark of their own, and a line at their error.

    Raises:
      ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("there are no rows to draw.")
    lines = _lines(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row.columns))
    heights = range(len(lines) - 1, -1, -1)
    with style.figure(size=(8.6, 0.9 + 0.2 * len(lines)), title=title) as (figure, grid):
        axes = grid[0, 0]
        for place, column in enumerate(columns):
            _beside(axes, place, len(lines), column, "#555555")
        for height, line in zip(heights, lines, strict=True):
            if not isinstance(line, Row):
                axes.axhspan(height - 0.5, height + 0.5, color="#eeeeee", linewidth=0, zorder=0)
                continue
            _draw(axes, height, line, marker="D" if line.name == reference else "o")
            for place, column in enumerate(columns):
                _beside(axes, place, height, line.columns.get(column, ""), "black")
        for error, color in {
            (row.error.mean, style.recipe_color(row.recipe))
            for row in rows
            if row.name == reference and row.error.n
        }:
            axes.axvline(max(error, _LEAST), color=color, lw=0.8, linestyle=":", zorder=0.5)
        axes.set_yticks(heights, [line.name if isinstance(line, Row) else line for line in lines])
        for tick, line in zip(axes.get_yticklabels(), lines, strict=True):
            tick.set(fontweight="normal" if isinstance(line, Row) else "bold")
        axes.tick_params(axis="y", length=0)
        axes.set(ylim=(-0.7, len(lines) - 0.3), xscale="log", xlabel="test error (%)")
        style.number_ticks(axes.xaxis)
        axes.grid(visible=False, axis="y")
        style.save(figure, path)


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


def _draw(axes: Any, height: float, row: Row, marker: str) -> None:
    """The mean of a row, with whiskers that end above zero."""
    if not row.error.n:
        axes.text(0.01, height, "no run finished", transform=_across(axes), **_SMALL)
        return
    error = max(row.error.mean, _LEAST)
    whiskers = None
    if row.error.n > 1:
        up = row.error.deviation
        whiskers = [[min(up, 0.9 * error)], [up]]
    color = style.recipe_color(row.recipe)
    axes.errorbar(error, height, xerr=whiskers, fmt=marker, color=color, markersize=4.5)


def _across(axes: Any) -> Any:
    """Coordinates of the picture across, of the rows up and down."""
    return axes.get_yaxis_transform()


def _beside(axes: Any, column: int, height: float, text: str, color: str) -> None:
    # In points from the axes: where it is a part of their width, the layout cuts it off.
    place = {"xytext": (70 + 62 * column, 0), "textcoords": "offset points"}
    axes.annotate(
        text, (1, height), xycoords=_across(axes), ha="right", color=color, **place, **_SMALL
    )
