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


def plot_pareto(points: Sequence[tuple[str, Result]], title: str, path: pathlib.Path) -> None:
    """Draws test error against bits an entry of the gradient and against the time of a step.

    The error is on a logarithmic axis, the least at the top. Every point has a place of its own
    among those of equal bits. A line joins what nothing else beats in both; whiskers are standard
    deviations over seeds.

    Args:
      points: labelled results.
      title: of the picture.
      path: of the PNG file.
    """
    import matplotlib.figure
    from matplotlib.ticker import LogLocator, NullLocator

    found = [(label, result) for label, result in points if result.summaries]
    bits, times = ([cost(r, name) for _, r in found] for name in ("gradient_bits", "step_ms"))
    places, centers, gaps = _side_by_side(bits)
    figure = matplotlib.figure.Figure(figsize=(13, 5.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(1.6, 1))
    for axes, costs, shown in zip(panels, (bits, times), (places, times), strict=True):
        placed = {}
        for number, ((label, result), x) in enumerate(zip(found, shown, strict=True), 1):
            worth = costs[number - 1]
            if x is None or worth is None:
                continue
            error, up = _error(result)
            axes.errorbar(
                x,
                error,
                yerr=[[min(up, 0.9 * error)], [up]],  # a logarithm ends above zero
                fmt="o",
                color=COLORS[(number - 1) % len(COLORS)],
                markersize=4,
                capsize=2,
                label=f"{number} {label} (n = {len(result.summaries)})",
            )
            axes.annotate(
                f"{number}", (x, error), xytext=(3, 2), textcoords="offset points", fontsize=7
            )
            placed[worth, -error] = (x, error)
        front = [placed[point] for point in pareto_front(list(placed))]
        axes.scatter(*zip(*front, strict=True), s=70, facecolors="none", edgecolors="black")
        axes.grid(alpha=0.3, axis="y", which="both")
    errors, step = panels[0], panels[1]
    errors.set_yscale("log")
    errors.invert_yaxis()
    errors.yaxis.set_major_formatter("{x:g}")
    errors.yaxis.set_minor_formatter("{x:g}")
    errors.set_xticks(list(centers.values()), [f"{x:g}" for x in centers])
    for place in gaps:
        errors.axvline(place, color="#dddddd", lw=0.8, zorder=0)
    errors.set(xlabel="cost of a gradient entry (bits)", ylabel="test error (%)")
    step.set_xscale("log")
    step.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    step.xaxis.set_major_formatter("{x:g}")
    step.xaxis.set_minor_locator(NullLocator())
    step.set_xlabel("training step, median (ms)")
    handles, labels = errors.get_legend_handles_labels()
    legend = "ringed: beaten in both by none"
    figure.legend(
        handles, labels, loc="outside right upper", fontsize=7, title=legend, title_fontsize=7
    )
    figure.suptitle(_wrapped(f"{title}: mean ± standard deviation over seeds", figure), fontsize=10)
    figure.savefig(path, dpi=130)


def _side_by_side(
    costs: Sequence[float | None],
) -> tuple[list[float | None], dict[float, float], list[float]]:
    """A place of its own on an axis for each cost, equal ones together; where the middle of equal
    ones is, and the gaps between those.
    """
    places: list[float | None] = [None] * len(costs)
    centers, gaps = {}, []
    at = 0.0
    for value in sorted({value for value in costs if value is not None}):
        alike = [i for i, other in enumerate(costs) if other == value]
        for shift, i in enumerate(alike):
            places[i] = at + shift
        centers[value] = at + (len(alike) - 1) / 2
        gaps.append(at + len(alike))
        at += len(alike) + 1
    return places, centers, gaps[:-1]


def _error(result: Result) -> tuple[float, float]:
    """Test error in %, never zero, and its deviation over seeds."""
    own = accuracy(result)
    return max(100 - own.mean, 0.05), own.deviation if own.n > 1 else 0.0


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
