"""The pictures of a report, as SVG that takes its colours of text and paper from the page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.reports.runs import Group
from experiments.show.gradients import time_figure
from experiments.sweeps.plots import COLORS

_INK = "#010203"
"""Stands for the page's colour of text while matplotlib draws."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": f"cycler('color', {list(COLORS)!r})",
    "legend.frameon": False,
    **{f"{part}.color": _INK for part in ("text", "xtick", "ytick")},
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
_LINES = ("-", "--", ":", "-.")


def _svg(figure: Any, description: str) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    size = re.search(r'width="([\d.]+)pt"', svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(_INK, "currentColor").replace("#000000", "currentColor")
    width = f"{float(size[1]):.0f}pt" if size else "100%"
    label = html.escape(description)
    return svg.replace(
        "<svg ", f'<svg role="img" aria-label="{label}" style="width:{width};max-width:100%" ', 1
    )


def _draw(salt: str, draw: Any) -> Any:
    """Runs ``draw`` in the style of the report; the salt keeps the pictures' names apart."""
    import matplotlib

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": salt}):
        figure, description = draw()
        return _svg(figure, description)


BANDS = 8
"""With more groups than this, curves have no bands: they would hide each other."""


def curves(task: str, groups: Sequence[Group]) -> str:
    """Training loss and validation accuracy over the epochs, a line for each group."""

    def draw() -> tuple[Any, str]:
        import matplotlib.figure

        rows = -(-len(groups) // 2)
        height = 3.2 + 0.19 * rows
        figure = matplotlib.figure.Figure(figsize=(9.5, height), layout="constrained")
        loss, accuracy = figure.subplots(1, 2)
        for i, group in enumerate(groups):
            style = {
                "color": COLORS[i % len(COLORS)],
                "linestyle": _LINES[i // len(COLORS) % len(_LINES)],
            }
            n = sum(bool(run.history) for run in group.runs)
            banded = len(groups) <= BANDS
            _line(loss, group, "train_loss", 1, style, f"{group.label} (n = {n})", banded)
            _line(accuracy, group, "validation_accuracy", 100, style, None, banded)
        loss.set_yscale("log")  # one run that diverged would flatten all others
        loss.set(xlabel="epoch", ylabel="training cross-entropy (nats)")
        loss.yaxis.set_major_formatter("{x:g}")
        accuracy.set(xlabel="epoch", ylabel="validation accuracy (%)")
        for axes in (loss, accuracy):
            axes.grid(alpha=0.25)
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        return figure, f"{task}: training loss and validation accuracy over the epochs"

    return str(_draw(f"curves {task}", draw))


def _line(
    axes: Any,
    group: Group,
    name: str,
    factor: float,
    style: dict[str, str],
    label: str | None,
    banded: bool,
) -> None:
    histories = [run.history for run in group.runs if run.history]
    if not histories:
        return
    # A run that was stopped has fewer epochs; the mean is over those that got so far.
    values = np.full((len(histories), max(map(len, histories))), np.nan)
    for row, history in zip(values, histories, strict=True):
        row[: len(history)] = [factor * line[name] for line in history]
    epochs = np.arange(1, values.shape[1] + 1)
    marker = "o" if len(epochs) < 20 else ""
    axes.plot(epochs, np.nanmean(values, 0), marker=marker, markersize=2.5, label=label, **style)
    if not banded:
        return
    low, high = np.nanmin(values, 0), np.nanmax(values, 0)
    axes.fill_between(epochs, low, high, color=style["color"], alpha=0.18, linewidth=0)


def accuracies(task: str, groups: Sequence[Group]) -> str:
    """Test accuracy of each group: a dot for each seed, a bar at the mean."""

    def draw() -> tuple[Any, str]:
        import matplotlib.figure

        figure = matplotlib.figure.Figure(
            figsize=(9.5, 0.9 + 0.3 * len(groups)), layout="constrained"
        )
        axes = figure.subplots()
        for y, group in enumerate(groups):
            values = [100 * run.summary["test_accuracy"] for run in group.ended if run.summary]
            color = COLORS[y % len(COLORS)]
            axes.plot(values, [y] * len(values), "o", color=color, markersize=4, alpha=0.8)
            if values:
                axes.plot([np.mean(values)], [y], "|", color=_INK, markersize=14)
        labels = [f"{group.label} (n = {len(group.ended)})" for group in groups]
        axes.set_yticks(range(len(groups)), labels, fontsize=8)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlabel("test accuracy (%): each seed, and the mean")
        axes.grid(alpha=0.25, axis="x")
        return figure, f"{task}: test accuracy of each group of runs"

    return str(_draw(f"accuracies {task}", draw))


def diagnosis(title: str, history: list[dict[str, Any]]) -> str:
    """The diagnoses of one run over its epochs."""

    def draw() -> tuple[Any, str]:
        return time_figure(history, title), f"{title}: diagnoses of the gradients over the epochs"

    return str(_draw(f"diagnosis {title}", draw))
