"""The pictures of a report, as SVG that takes its colours of text and paper from the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.reports.runs import Group
from experiments.show import style
from experiments.show.curves import Series, compare
from experiments.show.gradients import time_figure

_LEGEND, _TICKS = 64, 48
"""Characters in a line of a legend, and of the name of a row."""

BANDS = 8
"""With more groups than this, curves have no bands: they would hide each other."""


def curves(task: str, groups: Sequence[Group]) -> str:
    """Training loss and validation accuracy over the epochs, a line for each group."""
    series = []
    for group, line in zip(groups, _lines(groups), strict=True):
        histories = [run.history for run in group.runs if run.history]
        label = style.fill(f"{group.label} (n = {len(histories)})", _LEGEND)
        series.append(Series(label, histories, line))
    # The legend has two columns, and its rows are as high as the highest label.
    height = 3.2 + 0.19 * -(-len(groups) // 2) * max(_lines_of(each.label) for each in series)
    with style.figure(1, 2, size=(9.5, height)) as (figure, grid):
        loss, accuracy = grid[0]
        compare(loss, accuracy, series, band=len(groups) <= BANDS)
        loss.set_xlabel("epoch")
        figure.legend(loc="outside lower center", ncols=2)
        return style.svg(figure, f"{task}: training loss and validation accuracy over the epochs")


def accuracies(task: str, groups: Sequence[Group]) -> str:
    """Test accuracy of each group: a dot for each seed, a bar at the mean."""
    labels = [style.fill(f"{group.label} (n = {len(group.ended)})", _TICKS) for group in groups]
    row = 0.14 + 0.16 * max(map(_lines_of, labels))
    with style.figure(size=(9.5, 0.9 + row * len(groups))) as (figure, grid):
        axes = grid[0, 0]
        for y, (group, line) in enumerate(zip(groups, _lines(groups), strict=True)):
            values = [100 * run.summary["test_accuracy"] for run in group.ended if run.summary]
            dots = line | {"linestyle": "", "markersize": 4, "alpha": 0.8}
            axes.plot(values, [y] * len(values), **dots)
            if values:
                axes.plot([np.mean(values)], [y], "|", color="black", markersize=14)
        axes.set_yticks(range(len(groups)), labels)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlabel("test accuracy (%): each seed, and the mean")
        axes.grid(visible=False, axis="y")
        return style.svg(figure, f"{task}: test accuracy of each group of runs")


def _lines_of(text: str) -> int:
    return 1 + text.count("\n")


def _lines(groups: Sequence[Group]) -> list[dict[str, Any]]:
    return style.recipe_lines([group.runs[0].variant for group in groups])


def diagnosis(title: str, history: list[dict[str, Any]]) -> str:
    """The diagnoses of one run over its epochs."""
    with time_figure(history, title) as figure:
        return style.svg(figure, f"{title}: diagnoses of the gradients over the epochs")
