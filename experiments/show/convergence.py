"""The table and the picture of experiments.convergence."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np


def line(row: dict[str, Any]) -> str:
    """One result in one line."""
    return (
        f"{row['method']:<18}  {row['noise']:<28}  sigma {row['sigma']:<8.3g} "
        f"regret {row['regret']:.4f} ± {row['standard_error']:.4f}, bound {row['bound']:.3g}"
    )


def table(found: dict[str, Any]) -> str:
    """Markdown: the fitted slopes, then each regret beside its bound."""
    lines = [
        "| optimizer | slope in sigma, measured | of the bound, same points | of the bound, large "
        "sigma | fitted over sigma |",
        "|---|---|---|---|---|",
    ]
    for name, slope in found["slopes"].items():
        over = (
            f"{min(slope['sigmas']):.3g} to {max(slope['sigmas']):.3g}" if slope["sigmas"] else ""
        )
        measured, bound = (
            "-" if slope[k] is None else f"{slope[k]:.2f}" for k in ("regret", "bound")
        )
        large = f"{slope['bound_at_large_sigma']:.2f}"
        lines.append(f"| {name} | {measured} | {bound} | {large} | {over} |")
    lines += [
        "",
        "| optimizer | noise | sigma | average regret | bound | regret / bound |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['method']} | {row['noise']} | {row['sigma']:.3g} | {row['regret']:.4f} ± "
            f"{row['standard_error']:.4f} | {row['bound']:.3g} | "
            f"{row['regret'] / row['bound']:.3f} |"
        )
    verdict = "all" if found["all_under_bound"] else "NOT all"
    lines += ["", f"{verdict} {len(found['rows'])} regrets are under their bounds."]
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: pathlib.Path) -> None:
    """Regret and bound over sigma, and the excess over the regret without noise, with its fit."""
    import matplotlib.figure

    config = found["config"]
    figure = matplotlib.figure.Figure(figsize=(11, 4.6), layout="constrained")
    regret, excess = figure.subplots(1, 2)
    for i, (name, slope) in enumerate(found["slopes"].items()):
        colour = f"C{i}"
        rows = [row for row in found["rows"] if row["method"] == name]
        base = rows[0]["regret"]
        controlled = [row for row in rows[1:] if row["noise"] == "controlled"]
        real = [row for row in rows if row["noise"] != "controlled"]
        sigma = [row["sigma"] for row in controlled]
        regret.plot(sigma, [row["regret"] for row in controlled], "o-", color=colour, label=name)
        regret.plot(sigma, [row["bound"] for row in controlled], "--", color=colour)
        regret.plot(
            [row["sigma"] for row in real], [row["regret"] for row in real], "x", color=colour
        )
        over = [row for row in controlled if row["regret"] - base > 4 * row["standard_error"]]
        excess.errorbar(
            [row["sigma"] for row in over],
            [row["regret"] - base for row in over],
            [row["standard_error"] for row in over],
            fmt="o",
            color=colour,
            markersize=4,
        )
        for row in real:
            if row["regret"] - base > 4 * row["standard_error"]:
                excess.plot(row["sigma"], row["regret"] - base, "x", color=colour)
        if slope["regret"] is not None:
            x = np.array(slope["sigmas"])
            logs = [np.log(r["regret"] - base) for r in controlled if r["sigma"] in slope["sigmas"]]
            y = np.exp(np.mean(logs) + slope["regret"] * (np.log(x) - np.mean(np.log(x))))
            excess.plot(x, y, "-", color=colour, label=f"{name}: slope {slope['regret']:.2f}")
    regret.plot([], [], "k--", label="bound")
    for axes in (regret, excess):
        axes.plot([], [], "kx", label="real quantizers")
    excess.axhline(found["ceiling"], color="grey", linewidth=1, linestyle=":")
    excess.text(
        0.01, found["ceiling"] * 1.1, "fits end here", fontsize=8, color="grey",
        transform=excess.get_yaxis_transform(),
    )  # fmt: skip
    regret.set(ylabel="average regret (nats)", title="Regret and its bound")
    excess.set(ylabel="regret above that without noise (nats)", title="Growth with the noise")
    for axes in (regret, excess):
        axes.set(xscale="log", yscale="log", xlabel="sigma, norm of the gradient's noise (rms)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(
        f"Logistic regression on {config['images']} digits, |w| <= {config['half_width']:g}, "
        f"T = {config['steps']}, n = {config['runs']} runs",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
