"""The tables and the picture of experiments.convergence."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from experiments.show.formats import Table, number, spread


def line(row: dict[str, Any]) -> str:
    """One result in one line."""
    return (
        f"{row['method']}, {row['noise']}, sigma {row['sigma']:.3g}: regret {_regret(row)}, "
        f"bound {row['bound']:.3g}"
    )


def _regret(row: dict[str, Any]) -> str:
    return spread(row["regret"], row["standard_error"], ".4f")


def tables(found: dict[str, Any]) -> list[Table]:
    """The fitted slopes, and each regret beside its bound."""
    slopes = [
        [
            name,
            number(slope["regret"], ".2f"),
            number(slope["bound"], ".2f"),
            number(slope["bound_at_large_sigma"], ".2f"),
            f"{min(sigmas):.3g} to {max(sigmas):.3g}" if (sigmas := slope["sigmas"]) else "-",
        ]
        for name, slope in found["slopes"].items()
    ]
    regrets = [
        [
            row["method"],
            row["noise"],
            f"{row['sigma']:.3g}",
            _regret(row),
            f"{row['bound']:.3g}",
            f"{row['regret'] / row['bound']:.3f}",
        ]
        for row in found["rows"]
    ]
    verdict = "all" if found["all_under_bound"] else "NOT all"
    return [
        Table(
            "Growth of the regret with sigma, the norm of the noise, on logarithmic scales",
            [
                "optimizer",
                "slope, measured",
                "of the bound, same points",
                "of the bound, large sigma",
                "fitted over sigma",
            ],
            slopes,
        ),
        Table(
            "Average regret in nats, mean ± standard error",
            ["optimizer", "noise", "sigma", "regret", "bound", "regret / bound"],
            regrets,
            [f"{verdict} {len(regrets)} regrets are under their bounds."],
            names=2,
        ),
    ]


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
