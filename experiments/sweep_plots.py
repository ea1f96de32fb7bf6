"""Pictures of a sweep: curves with bands over seeds, and accuracy against cost."""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.sweep import Result
from experiments.sweep_tables import accuracy, cost

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


def plot_pareto(points: Sequence[tuple[str, Result]], title: str, path: pathlib.Path) -> None:
    """Draws test accuracy against bits an entry of the gradient and against the time of a step.

    The line joins what nothing else beats in both; whiskers are standard deviations over seeds.
    Points of the same number of bits stand side by side.

    Args:
      points: labelled results.
      title: of the picture.
      path: of the PNG file.
    """
    import matplotlib.figure

    found = [(label, result) for label, result in points if result.summaries]
    figure = matplotlib.figure.Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colors = _cycle(len(found))
    for axes, name in zip(panels, ("gradient_bits", "step_ms"), strict=True):
        placed = []
        costs = [cost(result, name) for _, result in found]
        log = name == "gradient_bits"
        for number, ((label, result), color) in enumerate(zip(found, colors, strict=True), 1):
            x, own = costs[number - 1], accuracy(result)
            if x is None:
                continue
            before, alike = costs[: number - 1].count(x), costs.count(x)
            step = min(0.08, 0.6 / alike)  # in octaves: the next number of bits is one away
            shown = x * 2 ** (step * (before - (alike - 1) / 2)) if log else x
            axes.errorbar(
                shown,
                own.mean,
                yerr=own.deviation if own.n > 1 else None,
                fmt="o",
                color=color,
                markersize=4,
                capsize=2,
                label=f"{number} {label} (n = {own.n})",
            )
            axes.annotate(
                f"{number}",
                (shown, own.mean),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=7,
            )
            placed.append((x, own.mean))
        front = pareto_front(placed)
        axes.plot(
            [x for x, _ in front], [y for _, y in front], color="black", linewidth=0.8, zorder=0
        )
        axes.grid(alpha=0.3)
    panels[0].set_xscale("log", base=2)
    panels[0].xaxis.set_major_formatter("{x:g}")
    panels[0].set(
        xlabel="cost of a gradient entry (bits; equal ones side by side)",
        ylabel="test accuracy (%)",
    )
    panels[1].set_xlabel("training step, median (ms)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=6.5)
    figure.suptitle(_wrapped(f"{title}: mean ± standard deviation over seeds", figure), fontsize=10)
    figure.savefig(path, dpi=130)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of which none other costs no more and is worth as much, by rising cost.

    Args:
      points: of each, the cost, and what it is worth.

    Example:
      >>> pareto_front([(4, 97), (1, 95), (1, 90), (2, 94), (8, 97)])
      [(1, 95), (4, 97)]
    """
    front: list[tuple[float, float]] = []
    for x, worth in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or worth > front[-1][1]:
            front.append((x, worth))
    return front


def _wrapped(text: str, figure: Any) -> str:
    """The text in lines that fit the figure's width at 10 points."""
    return textwrap.fill(text, int(11 * figure.get_size_inches()[0]))


def _cycle(n: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(n)]
