"""The tables and the picture of experiments.convergence."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from experiments.show import style
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
    config = found["config"]
    title = (
        f"Logistic regression on {config['images']} digits, |w| <= {config['half_width']:g}, "
        f"T = {config['steps']}, n = {config['runs']} runs"
    )
    with style.figure(1, 2, size=(11, 4.6), title=title) as (figure, grid):
        regret, excess = grid[0]
        for (name, slope), color in zip(found["slopes"].items(), style.COLORS, strict=False):
            base, *noisy = [row for row in found["rows"] if row["method"] == name]
            _draw(regret, excess, name, base["regret"], noisy, color)
            if slope["regret"] is not None:
                _draw_fit(excess, name, base["regret"], noisy, slope, color)
        regret.plot([], [], "k--", label="bound")
        excess.axhline(found["ceiling"], color="grey", linewidth=1, linestyle=":")
        excess.text(
            0.01, found["ceiling"] * 1.1, "fits end here", fontsize=8, color="grey",
            transform=excess.get_yaxis_transform(),
        )  # fmt: skip
        regret.set(ylabel="average regret (nats)", title="Regret and its bound")
        excess.set(ylabel="regret above that without noise (nats)", title="Growth with the noise")
        for axes in (regret, excess):
            axes.plot([], [], "kx", markersize=5, label="real quantizers")
            axes.set(xscale="log", yscale="log", xlabel="sigma, norm of the gradient's noise (rms)")
            axes.legend()
        style.save(figure, path)


def _draw(
    regret: Any, excess: Any, name: str, base: float, noisy: list[dict[str, Any]], color: str
) -> None:
    """One optimizer's results; of the excess, where it is above four standard errors."""
    controlled = [row for row in noisy if row["noise"] == "controlled"]
    real = [row for row in noisy if row["noise"] != "controlled"]
    sigma = [row["sigma"] for row in controlled]
    regret.plot(sigma, [row["regret"] for row in controlled], "o-", color=color, label=name)
    regret.plot(sigma, [row["bound"] for row in controlled], "--", color=color)
    cross = {"linestyle": "", "marker": "x", "markersize": 5, "color": color}
    regret.plot([row["sigma"] for row in real], [row["regret"] for row in real], **cross)
    for row in noisy:
        over = row["regret"] - base
        if over > 4 * row["standard_error"]:
            if row["noise"] == "controlled":
                excess.errorbar(
                    row["sigma"], over, row["standard_error"], fmt="o", color=color, capsize=0
                )
            else:
                excess.plot(row["sigma"], over, **cross)


def _draw_fit(
    excess: Any,
    name: str,
    base: float,
    noisy: list[dict[str, Any]],
    slope: dict[str, Any],
    color: str,
) -> None:
    sigmas = np.array(slope["sigmas"])
    fitted = [row for row in noisy if row["noise"] == "controlled" and row["sigma"] in sigmas]
    logs = np.log([row["regret"] - base for row in fitted])
    y = np.exp(np.mean(logs) + slope["regret"] * (np.log(sigmas) - np.mean(np.log(sigmas))))
    excess.plot(sigmas, y, "-", color=color, label=f"{name}: slope {slope['regret']:.2f}")
