"""The pictures of experiments.gradient_statistics."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.show import style
from fqt_jax.diagnostics import (
    STALL_NOISE_TO_SIGNAL,
    LayerGradient,
    effective_groups,
    group_ranges,
    lorenz_curve,
)

States = dict[int, dict[str, LayerGradient]]
_AXES = (("samples", 0), ("channels", 3))


@contextlib.contextmanager
def _grid(states: States, title: str) -> Iterator[tuple[Any, Any]]:
    """A column for each layer, a row for samples and one for channels, and the epochs' colours."""
    from matplotlib.patches import Patch

    layers = list(next(iter(states.values())))
    size = (max(6.0, 2.3 * len(layers)), 5.2)
    with style.figure(2, len(layers), size=size, title=title, sharey="row") as (figure, grid):
        for column, path in enumerate(layers):
            grid[0, column].set_title(path)
        patches = [Patch(color=color) for color, _ in zip(style.COLORS, states, strict=False)]
        figure.legend(patches, [*map(_name, states)], loc="outside lower center", ncols=2)
        yield figure, grid


def _each(states: States) -> Iterator[tuple[int, int, str, str, np.ndarray]]:
    """Row and column in the grid, kind of the groups, colour of the epoch, and their ranges."""
    for row, (kind, axis) in enumerate(_AXES):
        for layers, color in zip(states.values(), style.COLORS, strict=False):
            for column, layer in enumerate(layers.values()):
                yield row, column, kind, color, group_ranges(layer.exact_g, axis)


def _name(epoch: int) -> str:
    return "before training" if epoch == 0 else f"after epoch {epoch}"


def plot_groups(states: States, path: pathlib.Path, title: str) -> None:
    """Histograms of the groups' ranges, relative to the mean range of the layer's groups."""
    bins = [float(b) for b in np.linspace(-2, 1, 31)]
    with _grid(states, f"Ranges of the exact gradient's groups: {title}") as (figure, grid):
        for row, column, kind, color, ranges in _each(states):
            logs = np.log10(np.clip(ranges / max(ranges.mean(), 1e-300), 1e-2, 10))
            part = np.full(len(logs), 100 / len(logs))
            axes = grid[row, column]
            axes.hist(logs, bins, weights=part, color=color, alpha=0.55)
            axes.set_xlabel(f"log10(range / mean), n = {len(logs)}")
            grid[row, 0].set_ylabel(f"% of {kind}")
        style.save(figure, path)


def plot_lorenz(states: States, path: pathlib.Path, title: str) -> None:
    """Lorenz curves of the ranges, with the effective number of groups."""
    with _grid(states, f"Lorenz curves of the exact gradient's ranges: {title}") as (figure, grid):
        for row, column, kind, color, ranges in _each(states):
            label = f"{effective_groups(ranges):.1f} of {len(ranges)}"
            axes = grid[row, column]
            axes.plot(*lorenz_curve(ranges), color=color, label=label)
            axes.plot([0, 1], [0, 1], color="grey", linewidth=0.7, linestyle=":")
            axes.set(xlabel=f"part of the {kind}", xlim=(0, 1), ylim=(0, 1))
            axes.legend(loc="upper left", title="effective number")
            grid[row, 0].set_ylabel(f"part of the ranges' sum\n(smallest {kind} first)")
        style.save(figure, path)


def plot_time(records: list[dict[str, Any]], path: pathlib.Path, title: str) -> None:
    """Draws :func:`time_figure` to a file."""
    with time_figure(records, title) as figure:
        style.save(figure, path)


_PANELS = (
    ("kernel_noise_to_signal", "noise / signal of the weights' gradient"),
    ("input_noise_to_signal", "noise / signal of g, for the input gradient"),
    ("weight_noise_to_signal", "noise / signal of g, for the weight gradient"),
    ("exact_effective_samples", "effective samples (%), float backward pass"),
    ("effective_samples", "effective samples (%), as the layer gets them"),
    ("sign_flip_ratio", "weights that changed sign in the epoch (%)"),
)


@contextlib.contextmanager
def time_figure(records: list[dict[str, Any]], title: str) -> Iterator[Any]:
    """Noise-to-signal, heterogeneity and sign flips over the epochs, as a figure to be saved.

    Args:
      records: of each epoch, ``epoch`` and ``diagnosis``, what
        :func:`fqt_jax.diagnostics.diagnose` found.
      title: of the picture.
    """
    last = records[-1]["diagnosis"]
    suffix = "/gradient_norm"
    layers = [name.removesuffix(suffix) for name in last if name.endswith(suffix)]
    with style.figure(2, 3, size=(12, 7), title=title) as (figure, grid):
        for axes, (statistic, label) in zip(grid.flat, _PANELS, strict=True):
            for layer in layers:
                axes.plot(*_over_time(records, layer, statistic), marker="o", label=layer)
            axes.set(xlabel="epoch", ylabel=label, xlim=(-0.2, records[-1]["epoch"] + 0.2))
            style.whole_ticks(axes)
            if "effective" in statistic:
                axes.set_ylim(0, 103)
            elif statistic == "kernel_noise_to_signal":
                _mark_threshold(axes)
            else:
                axes.set_ylim(0)
        handles = grid[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=min(5, len(layers)))
        yield figure


def _over_time(
    records: list[dict[str, Any]], layer: str, statistic: str
) -> tuple[list[int], list[float]]:
    """The epochs in which a layer's statistic was taken, and its values; of parts, in percent."""
    x, y = [], []
    for record in records:
        found = record["diagnosis"]
        value = found.get(f"{layer}/{statistic}")
        if value is not None:
            whole = found[f"{layer}/samples"] if "effective" in statistic else 1
            percent = "effective" in statistic or statistic == "sign_flip_ratio"
            x.append(record["epoch"])
            y.append(100 * value / whole if percent else value)
    return x, y


def _mark_threshold(axes: Any) -> None:
    axes.axhline(STALL_NOISE_TO_SIGNAL, color="black", linestyle=":", linewidth=1)
    axes.text(
        0.01, STALL_NOISE_TO_SIGNAL, "1/sqrt(3)", fontsize=8, va="bottom",
        transform=axes.get_yaxis_transform(),
    )  # fmt: skip
    if min(min(line.get_ydata(), default=1) for line in axes.lines) > 0.05:
        axes.set_yscale("log")
        style.number_ticks(axes.yaxis)
    else:
        axes.set_ylim(0)


_TERMS = {"rounding": "o", "mask": "s", "bias": "^"}
"""The terms of an error, and their marks."""


def plot_errors(rows: list[dict[str, Any]], path: pathlib.Path, title: str) -> None:
    """The error of each quantization by term, and measured over predicted for each layer."""
    names = list(dict.fromkeys(row["quantization"] for row in rows))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    last = max(row["epoch"] for row in rows)
    title = f"Error of one-bit gradients: {title}"
    with style.figure(1, 2, size=(12, 6.6), title=title, sharey=True) as (figure, grid):
        size, ratio = grid[0]
        for row in rows:
            layer = layers.index(row["layer"])
            aside = (layer - (len(layers) - 1) / 2) * 0.8 / len(layers)
            height = names.index(row["quantization"]) + aside
            if row["epoch"] == last:
                _draw_terms(size, row, height)
            ratio.errorbar(
                100 * (row["ratio"] - 1),
                height,
                xerr=200 * row["standard_error"] / row["predicted"],
                fmt="o" if row["epoch"] == last else "s",
                color=style.COLORS[layer % len(style.COLORS)],
                elinewidth=0.7,
                capsize=0,
            )
        for term, color in zip(_TERMS, style.COLORS, strict=False):
            size.plot([], [], _TERMS[term], color=color, label=f"{term}, predicted")
        size.plot([], [], "k|", markersize=8, label="all, measured")
        size.set(
            xscale="log", xlabel=f"error / |g|^2 by term, {_name(last)}; a row of marks a layer"
        )
        size.set_yticks(range(len(names)), names)
        size.invert_yaxis()
        style.number_ticks(size.xaxis)
        ratio.axvspan(-2, 2, color="grey", alpha=0.15, linewidth=0, label="within 2%")
        ratio.axvline(0, color="black", linewidth=0.7)
        for layer, color in zip(layers, itertools.cycle(style.COLORS)):
            ratio.plot([], [], color=color, label=layer)
        ratio.plot([], [], "ks", label="before training")
        ratio.plot([], [], "ko", label=_name(last))
        ratio.set_xlabel("measured / predicted - 1 (%), bars: two standard errors")
        for axes, place, columns in ((size, "left", 2), (ratio, "right", 4)):
            axes.grid(visible=False, axis="y")
            handles = axes.get_legend_handles_labels()
            figure.legend(*handles, loc=f"outside lower {place}", ncols=columns)
        style.save(figure, path)


def _draw_terms(axes: Any, row: dict[str, Any], height: float) -> None:
    for (term, mark), color in zip(_TERMS.items(), style.COLORS, strict=False):
        if row[term] > 0:
            axes.plot(row[term], height, mark, color=color)
    axes.plot(row["measured"], height, "k|", markersize=6)
