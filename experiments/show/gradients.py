"""The pictures of experiments.gradient_statistics."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from fqt_jax.diagnostics import (
    STALL_NOISE_TO_SIGNAL,
    LayerGradient,
    effective_groups,
    group_ranges,
    lorenz_curve,
)

States = dict[int, dict[str, LayerGradient]]
_AXES = (("samples", 0), ("channels", 3))


def _grid(states: States, title: str, height: float) -> tuple[Any, Any]:
    """A figure with a column for each layer and a row for samples and one for channels."""
    import matplotlib.figure

    layers = list(next(iter(states.values())))
    size = (max(6.0, 2.3 * len(layers)), 2 * height)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    grid = figure.subplots(2, len(layers), squeeze=False, sharey="row")
    for column, path in enumerate(layers):
        grid[0, column].set_title(path, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure, grid


def _name(epoch: int) -> str:
    return "before training" if epoch == 0 else f"after epoch {epoch}"


def plot_groups(states: States, path: pathlib.Path, title: str) -> None:
    """Histograms of the groups' ranges, relative to the mean range of the layer's groups."""
    figure, grid = _grid(states, f"Ranges of the exact gradient's groups: {title}", 2.5)
    for row, (kind, axis) in enumerate(_AXES):
        for i, (epoch, layers) in enumerate(states.items()):
            for column, layer in enumerate(layers.values()):
                ranges = group_ranges(layer.exact_g, axis)
                bins = [float(b) for b in np.linspace(-2, 1, 31)]
                logs = np.log10(np.clip(ranges / max(ranges.mean(), 1e-300), 1e-2, 10))
                part = np.full(len(logs), 100 / len(logs))
                axes = grid[row, column]
                axes.hist(logs, bins, weights=part, color=f"C{i}", alpha=0.55, label=_name(epoch))
                axes.set_xlabel(f"log10(range / mean), n = {len(logs)}", fontsize=8)
                axes.grid(alpha=0.3)
        grid[row, 0].set_ylabel(f"% of {kind}")
    grid[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=130)


def plot_lorenz(states: States, path: pathlib.Path, title: str) -> None:
    """Lorenz curves of the ranges, with the effective number of groups."""
    figure, grid = _grid(states, f"Lorenz curves of the exact gradient's ranges: {title}", 2.5)
    for row, (kind, axis) in enumerate(_AXES):
        for i, (epoch, layers) in enumerate(states.items()):
            for column, layer in enumerate(layers.values()):
                ranges = group_ranges(layer.exact_g, axis)
                label = f"{_name(epoch)}: {effective_groups(ranges):.1f} of {len(ranges)}"
                axes = grid[row, column]
                axes.plot(*lorenz_curve(ranges), color=f"C{i}", label=label)
                axes.plot([0, 1], [0, 1], color="grey", linewidth=0.7, linestyle=":")
                axes.set(xlabel=f"part of the {kind}", xlim=(0, 1), ylim=(0, 1))
                axes.legend(fontsize=6.5, title="effective number", title_fontsize=6.5)
                axes.grid(alpha=0.3)
        grid[row, 0].set_ylabel(f"part of the ranges' sum\n(smallest {kind} first)")
    figure.savefig(path, dpi=130)


def plot_time(records: list[dict[str, Any]], path: pathlib.Path, title: str) -> None:
    """Draws :func:`time_figure` to a PNG file."""
    time_figure(records, title).savefig(path, dpi=130)


def time_figure(records: list[dict[str, Any]], title: str) -> Any:
    """Noise-to-signal, heterogeneity and sign flips over the epochs.

    Args:
      records: of each epoch, ``epoch`` and ``diagnosis``, what
        :func:`fqt_jax.diagnostics.diagnose` found.
      title: of the picture.

    Returns:
      A matplotlib figure.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(12, 7), layout="constrained")
    grid = figure.subplots(2, 3)
    panels = (
        ("kernel_noise_to_signal", "noise / signal of the weights' gradient"),
        ("input_noise_to_signal", "noise / signal of g, for the input gradient"),
        ("weight_noise_to_signal", "noise / signal of g, for the weight gradient"),
        ("exact_effective_samples", "effective samples (%), float backward pass"),
        ("effective_samples", "effective samples (%), as the layer gets them"),
        ("sign_flip_ratio", "weights that changed sign in the epoch (%)"),
    )
    last = records[-1]["diagnosis"]
    suffix = "/gradient_norm"
    layers = [name.removesuffix(suffix) for name in last if name.endswith(suffix)]
    for axes, (statistic, label) in zip(grid.flat, panels, strict=True):
        for i, layer in enumerate(layers):
            x, y = [], []
            for record in records:
                found = record["diagnosis"]
                value = found.get(f"{layer}/{statistic}")
                if value is None:
                    continue
                if "effective" in statistic:
                    value *= 100 / found[f"{layer}/samples"]
                x.append(record["epoch"])
                y.append(100 * value if statistic == "sign_flip_ratio" else value)
            axes.plot(x, y, marker="o", markersize=3, color=f"C{i}", label=layer)
        if statistic == "kernel_noise_to_signal":
            axes.axhline(STALL_NOISE_TO_SIGNAL, color="black", linestyle=":", linewidth=1)
            axes.text(
                0.01, STALL_NOISE_TO_SIGNAL, "1/sqrt(3)", fontsize=8, va="bottom",
                transform=axes.get_yaxis_transform(),
            )  # fmt: skip
        axes.set(xlabel="epoch", ylabel=label)
        axes.set_xlim(-0.2, records[-1]["epoch"] + 0.2)
        if statistic == "kernel_noise_to_signal" and min(axes.lines[0].get_ydata()) > 0.05:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.tick_params(axis="y", which="minor", labelsize=7)
        else:
            axes.set_ylim(0, 103 if "effective" in statistic else None)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    grid[0, 1].legend(fontsize=7)
    for axes in grid.flat:
        axes.yaxis.label.set_size(9)
    figure.suptitle(title, fontsize=10)
    return figure


def plot_errors(rows: list[dict[str, Any]], path: pathlib.Path, title: str) -> None:
    """The error of each quantization by term, and measured over predicted for each layer."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(12, 6.2), layout="constrained")
    size, ratio = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row["quantization"] for row in rows))
    last = max(row["epoch"] for row in rows)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    for i, layer in enumerate(layers):
        for j, name in enumerate(names):
            offset = j + (i - (len(layers) - 1) / 2) * 0.8 / len(layers)
            for row in rows:
                if (row["layer"], row["quantization"]) != (layer, name):
                    continue
                if row["epoch"] == last:
                    for k, term in enumerate(("rounding", "mask", "bias")):
                        if row[term] > 0:
                            size.plot(row[term], offset, "os^"[k], color=f"C{k}", markersize=3)
                    size.plot(row["measured"], offset, "k|", markersize=6)
                marker = "o" if row["epoch"] == last else "s"
                ratio.errorbar(
                    100 * (row["ratio"] - 1),
                    offset,
                    xerr=200 * row["standard_error"] / row["predicted"],
                    fmt=marker,
                    markersize=3,
                    color=f"C{i}",
                    label=layer if j == 0 and row["epoch"] == last else None,
                    elinewidth=0.7,
                )
    for k, term in enumerate(("rounding", "mask", "bias")):
        size.plot([], [], "os^"[k], color=f"C{k}", label=f"{term}, predicted")
    size.plot([], [], "k|", markersize=8, label="all, measured")
    size.set_xscale("log")
    ratio.axvspan(-2, 2, color="grey", alpha=0.15, label="within 2%")
    ratio.plot([], [], "ks", markersize=3, label="before training")
    ratio.plot([], [], "ko", markersize=3, label=_name(last))
    ratio.axvline(0, color="black", linewidth=0.7)
    size.set_yticks(range(len(names)), names)
    size.invert_yaxis()
    size.set(xlabel=f"error / |g|^2 by term, {_name(last)}; one row of marks a layer")
    ratio.set(xlabel="measured / predicted - 1 (%), bars: two standard errors")
    for axes, place in ((size, "upper left"), (ratio, "lower left")):
        axes.grid(alpha=0.3, axis="x")
        axes.legend(fontsize=7, loc=place)
    figure.suptitle(f"Error of one-bit gradients: {title}", fontsize=10)
    figure.savefig(path, dpi=130)
