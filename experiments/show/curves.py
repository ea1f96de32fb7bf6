"""Curves of training: means over runs, with bands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.show import style

Histories = Sequence[Sequence[dict[str, Any]]]
"""The epochs of some runs, as in ``metrics.jsonl``."""


def curve(
    axes: Any,
    histories: Histories,
    name: str,
    label: str | None = None,
    *,
    factor: float = 1.0,
    band: bool = True,
    **line: Any,
) -> None:
    """Draws a metric over the epochs: the mean of the runs, in a band from the least to the most.

    Args:
      axes: where to.
      histories: runs; one that was stopped has fewer epochs, and counts in those that it has.
      name: of the metric.
      label: in the legend.
      factor: on the values, 100 for percent.
      band: whether to draw the band; many would hide each other.
      **line: as for :meth:`matplotlib.axes.Axes.plot`.
    """
    values = np.full((len(histories), max(map(len, histories), default=0)), np.nan)
    for row, history in zip(values, histories, strict=True):
        row[: len(history)] = [factor * epoch[name] for epoch in history]
    if not values.size:
        axes.plot([], [], label=label, **line)  # the legend tells that there is none
        return
    epochs = np.arange(1, values.shape[1] + 1)
    every = max(1, len(epochs) // 10)
    line = {"marker": "o", "markevery": every} | line
    (drawn,) = axes.plot(epochs, np.nanmean(values, 0), label=label, **line)
    if band and len(values) > 1:
        low, high = np.nanmin(values, 0), np.nanmax(values, 0)
        axes.fill_between(epochs, low, high, color=drawn.get_color(), alpha=0.18, linewidth=0)


class Series(NamedTuple):
    """One line of :func:`compare`: its label, its runs, and how it is drawn."""

    label: str
    histories: Histories
    line: dict[str, Any]


def compare(loss: Any, accuracy: Any, series: Sequence[Series], *, band: bool = True) -> None:
    """Draws the training loss of each series, with its label, and its validation accuracy."""
    for label, histories, line in series:
        curve(loss, histories, "train_loss", label, band=band, **line)
        curve(accuracy, histories, "validation_accuracy", factor=100, band=band, **line)
    # One run that diverged would flatten all others on a linear scale.
    loss.set(yscale="log", ylabel="training cross-entropy (nats)")
    accuracy.set(ylabel="validation accuracy (%)", xlabel="epoch")
    style.number_ticks(loss.yaxis)
    style.whole_ticks(loss, accuracy)
