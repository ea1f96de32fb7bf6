"""What experiments.speed shows: tables and a bar chart."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.bench.contenders import PHASES, Setting
from experiments.show import style
from experiments.show.formats import Table, count, number
from fqt_jax.text import format_table

_STEP_COLUMNS = {
    "forward": "training-mode forward pass to the loss, keeping nothing, ms",
    "fwd+bwd": "forward and backward pass to the gradients, ms",
    "update": "Adam, ms",
    "step": "a whole training step, ms: median, minimum and maximum",
    "first": "until the first step is over, s: making the model, compilation, one step",
    "vs float": "how many times as fast as the fastest contender that quantizes nothing",
    "vs torch, jax": "as PyTorch in fp32, uncompiled, and as JAX in fp32 as its user writes it",
    "G products/s": "multiply-adds of convolutions and dense layers left by pruning, over the step",
    "of peak": "the same over the rate of an fp32 matrix product here",
    "temp": "temporary memory of the compiled step, MiB; args: what goes in (state and data)",
}

_RSS_COLUMNS = {
    "RSS steps": "peak of the resident memory of a process of its own over two steps, MiB",
    "RSS building": "the same until the first step is over, compilation included",
    "RSS imports": "the same before the model is made",
}

_LAYER_LEGEND = """\
Products as FQT1 does them (4-bit gradients, a quarter of the groups kept), rounding included,
packing of signs and drawing of groups excluded. ms; G products/s; and in parentheses how many
times as fast as an fp32 BLAS matrix product of the same number of multiply-adds. What the native
kernels computed on matrix tiles or by counting bits is marked so; the rest is by look-up."""

_FORM_MARKS = {"tiles": " tiles", "popcount": " popcount"}


def tables(report: dict[str, Any], setting: Setting) -> str:
    """Everything that was measured, as text."""
    parts = []
    every = [*report["runs"], *report["layers"], *report["check"]]
    if every:
        parts.append(_heading(every[0]["machine"], setting))
    parts += [str(_step_table(run, setting.samples)) for run in report["runs"]]
    if report["runs"]:
        legend = _STEP_COLUMNS | (_RSS_COLUMNS if _has_rss(report["runs"]) else {})
        rows = [[name, meaning] for name, meaning in legend.items()]
        parts.append(format_table(["column", "meaning"], rows, names=2))
    parts += [str(_layer_table(run)) for run in report["layers"]]
    if report["layers"]:
        parts.append(_LAYER_LEGEND)
    parts += [str(_check_table(run)) for run in report["check"]]
    return "\n\n".join(parts)


def _heading(machine: dict[str, Any], setting: Setting) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    return (
        f"{setting.model} x{setting.width:g}, batch {setting.batch_size}, {setting.size}\n"
        f"{machine['cpu']}, {machine['device']}, {machine['memory_gib']:g} GiB\n"
        f"instruction sets: {', '.join(f'{k} {v}' for k, v in machine['isas'].items())}\n"
        f"Python {machine['python']}, {versions}\n{machine['date']}"
    )


def _has_rss(runs: Sequence[dict[str, Any]]) -> bool:
    return any("rss" in result for run in runs for result in run["contenders"].values())


def _step_table(run: dict[str, Any], samples: str) -> Table:
    columns = [
        "contender",
        "forward",
        "fwd+bwd",
        "update",
        "step",
        "min",
        "max",
        "first",
        f"{samples}/s",
    ]
    columns += ["vs float", "vs torch", "vs jax", "G products/s", "of peak", "temp", "args"]
    has_rss = _has_rss([run])
    if has_rss:
        columns += ["RSS steps", "RSS building", "RSS imports"]
    rows = []
    for name, result in run["contenders"].items():
        phases, speedup, memory = result["phases"], result["speedup"], result["memory"] or {}
        total = phases["total"]
        row = [name, *(_ms(phases[p]["median"] if p in phases else None) for p in PHASES)]
        row += [_ms(total["min"]), _ms(total["max"]), f"{result['first']:.1f}"]
        row += [f"{result['samples_per_second']:.0f}"]
        row += [number(speedup.get(other), ".2f") for other in ("float", "torch", "jax")]
        row += [f"{result['rate']:.1f}", f"{result['share_of_peak']:.0%}"]
        row += [_mib(memory.get(key)) for key in ("temp", "argument")]
        if has_rss:
            row += [_mib(result["rss"][key]) for key in ("steps", "building", "before")]
        rows.append(row)
    title = f"{_threads(run)}; fp32 matrix product {run['dot_rate']:.0f} G multiply-adds/s"
    return Table(title, columns, rows, run["left_out"])


def _layer_table(run: dict[str, Any]) -> Table:
    names = list(next(iter(run["totals"].values()))["implementations"])
    rows = []
    for layer in run["layers"]:
        path = layer["path"] + (f" ({layer['count']} such)" if layer["count"] > 1 else "")
        head = [path, layer["shape"]]
        for product, entry in layer["products"].items():
            times = {n: t["median"] for n, t in entry["implementations"].items()}
            cells = _product_cells(entry, entry["dot"]["median"], times, names)
            if entry["native_form"] in _FORM_MARKS:
                cells[1 + names.index("native")] += _FORM_MARKS[entry["native_form"]]
            rows.append([*head, product, *cells])
            head = ["", ""]
    for product, entry in run["totals"].items():
        cells = _product_cells(entry, entry["dot"], entry["implementations"], names)
        rows.append(["all layers", "", product, *cells])
    columns = ["layer", "shape", "product", "fp32 dot", *names]
    return Table(_threads(run), columns, rows, names=3)


def _product_cells(
    entry: dict[str, Any], dot: float, times: dict[str, float | None], names: Sequence[str]
) -> list[str]:
    work = entry["g_products"]
    cells = [f"{_ms(dot)}; {1e3 * work / dot:.0f}"]
    for name in names:
        ms = times.get(name)
        if ms is None:
            cells.append("declined")
        else:
            cells.append(f"{_ms(ms)}; {1e3 * work / ms:.0f} ({dot / ms:.2f})")
    return cells


def verdict(line: dict[str, Any]) -> str:
    """Whether an implementation's product is that of the reference."""
    if not line["layers"]:
        return "declined"
    return "ok" if line["ok"] else "DIFFERS"


def _check_table(run: dict[str, Any]) -> Table:
    """Each implementation's products against the reference."""
    rows, notes = [], []
    for line in run["check"]:
        own = [line["implementation"], line["product"]]
        # Where every layer is declined, the first reason stands for all.
        reasons = line["declined"] if line["layers"] else line["declined"][:1]
        notes += [f"{', '.join(own)} declined: {reason}" for reason in reasons]
        measured = [f"{line['difference']:.1e}", _ms(line["ms"]), _ms(line["xla_ms"])]
        cells = measured if line["layers"] else ["-"] * 3
        rows.append([*own, verdict(line), str(line["layers"]), *cells])
    columns = ["implementation", "product", "verdict", "shapes", "max difference", "ms", "xla, ms"]
    return Table(f"{_threads(run)}: against the reference", columns, rows, notes, names=3)


def _threads(run: dict[str, Any]) -> str:
    return count(run["threads"], "thread")


def _ms(value: float | None) -> str:
    return number(value, ".3g" if value is None or value < 100 else ".0f")


def _mib(value: int | None) -> str:
    return number(None if value is None else value / 2**20, ".0f")


def plot(runs: Sequence[dict[str, Any]], setting: Setting, path: pathlib.Path) -> None:
    """Draws the time of a step and of its parts, a panel for each number of threads."""
    n = max(len(run["contenders"]) for run in runs)
    repeats = len(next(iter(runs[0]["contenders"].values()))["phases"]["total"]["samples"])
    title = (
        f"Training step of {setting.model} x{setting.width:g}, batch {setting.batch_size}, "
        f"{setting.size}; median of {repeats}\n"
        f"{runs[0]['machine']['cpu']}, {runs[0]['machine']['device']}"
    )
    size = (5 * len(runs) + 1.5, 1.6 + 0.4 * n)
    with style.figure(1, len(runs), size=size, title=title, sharey=True) as (figure, grid):
        panels = grid[0]
        for axes, run in zip(panels, runs, strict=True):
            _draw(axes, run)
            axes.set_title(_threads(run))
        panels[0].invert_yaxis()
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4)
        style.save(figure, path)


_PARTS = {"forward": style.COLORS[3], "backward": style.COLORS[4], "update": style.COLORS[0]}
"""The parts of a step, and their colours."""


def _draw(axes: Any, run: dict[str, Any]) -> None:
    """Stacks the parts, as measured on their own, and marks the whole step with its range."""
    names = list(run["contenders"])
    start = [0.0] * len(names)
    for label, color in _PARTS.items():
        widths = [_part(run["contenders"][name]["phases"], label) for name in names]
        axes.barh(names, widths, left=start, label=label, color=color)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    totals = [run["contenders"][name]["phases"]["total"] for name in names]
    medians = [t["median"] for t in totals]
    below = [t["median"] - t["min"] for t in totals]
    above = [t["max"] - t["median"] for t in totals]
    axes.errorbar(medians, names, xerr=[below, above], fmt="k|", label="step, with its range")
    for i, (name, total) in enumerate(zip(names, totals, strict=True)):
        ratio = run["contenders"][name]["speedup"].get("float")
        text = f" {_ms(total['median'])}" + (f" ({ratio:.1f}x float)" if ratio else "")
        axes.text(max(total["max"], start[i]), i, text, va="center", fontsize=8)
    axes.set(xlabel="time (ms)", xlim=(0, 1.35 * max(*start, *(t["max"] for t in totals))))
    axes.grid(visible=False, axis="y")


def _part(phases: dict[str, Any], label: str) -> float:
    def median(phase: str) -> float:
        return float(phases[phase]["median"]) if phase in phases else 0.0

    if label == "backward":
        return max(0.0, median("forward_backward") - median("forward"))
    return median(label)
