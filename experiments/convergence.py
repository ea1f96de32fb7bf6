"""Checks the regret bounds of fqt_jax.theory on a convex problem.

    python -m experiments.convergence

Multinomial logistic regression on the UCI digits over a box, with noise of a controlled scale and
with the noise of the real quantizers. Projected SGD and AMSGrad run at learning rates that do not
know the noise. Writes regrets, bounds and fitted slopes in sigma as JSON, a table and a picture.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets

from experiments import cli
from experiments.runs.folders import output_folder, write_json, write_text
from experiments.show import convergence as convergence_report
from experiments.show.formats import show, to_markdown
from fqt_jax import theory
from fqt_jax.diagnostics import Quantization, quantized_gradient
from fqt_jax.recipe import GradientQuantizer

QUANTIZERS: dict[str, Quantization] = {
    "PSQ, 1 bit": Quantization(GradientQuantizer(1, 1.0, groups="sample"), "weight"),
    "PSQ, 2 bits": Quantization(GradientQuantizer(2, 1.0, groups="sample"), "weight"),
    "PSQ, 4 bits": Quantization(GradientQuantizer(4, 1.0, groups="sample"), "weight"),
    "AGP 4 bits, 1/4 of channels": Quantization(GradientQuantizer(4), "weight"),
    "AGP 4 bits, 1/4 of samples": Quantization(GradientQuantizer(4, prune="shared"), "weight"),
    "AGP 4 bits, 1/16 of samples": Quantization(
        GradientQuantizer(4, 1 / 16, "bernoulli", prune="shared"), "weight"
    ),
}
"""The real sources of noise, in the weight gradient."""


@dataclasses.dataclass(frozen=True)
class ConvergenceConfig:
    """What is run."""

    steps: int = 1000
    """Steps of each run, T."""
    runs: int = 8
    """Runs that each average is over."""
    sigmas: tuple[float, ...] = (0.0, 0.03, 0.06, 0.1, 0.2, 0.3, 0.6, 1.0, 2.0, 10.0, 30.0)
    """Scales of the controlled noise; the first must be 0."""
    images: int = 512
    """Digits that the loss is the mean over, up to 1797."""
    half_width: float = 0.5
    """Each weight lies within this of zero."""
    sgd_learning_rate: float = 20.0
    """SGD's eta; a step is eta / sqrt(T)."""
    adam_learning_rate: float = 0.4
    """AMSGrad's alpha; a step is alpha / sqrt(T)."""
    quantizers: bool = True
    """Run with the real quantizers as well."""
    seed: int = 0
    """Decides the noise."""
    out: pathlib.Path | None = None
    """Folder for the results, which must not exist; the default is a new one under runs/."""

    def __post_init__(self) -> None:
        if self.steps < 2 or self.runs < 2:
            raise cli.UserError("steps and runs must be at least 2.")
        first, *noisy = self.sigmas or (1.0,)
        if first != 0 or len(noisy) < 2 or sorted(set(noisy)) != noisy or noisy[0] <= 0:
            raise cli.UserError("sigmas must be 0 and two or more positive numbers, increasing.")
        if not 10 <= self.images <= 1797:
            raise cli.UserError(f"images must be from 10 to 1797; got {self.images}.")
        for name in ("half_width", "sgd_learning_rate", "adam_learning_rate"):
            if not getattr(self, name) > 0:
                raise cli.UserError(f"{name} must be positive; got {getattr(self, name)}.")


class Problem(NamedTuple):
    """The loss ``f(W) = mean cross-entropy(x W)`` over the box ``|W| <= half_width``.

    Attributes:
      x: ``float32[n, 65]``, centred pixels and a one for the bias.
      y: ``float32[n, 10]``, one-hot labels.
      half_width: of the box.
      least: a lower bound on the loss over the box, within 1e-5 of the minimum.
    """

    x: np.ndarray
    y: np.ndarray
    half_width: float
    least: float


class Method(NamedTuple):
    """An optimizer: ``beta1`` is None for SGD."""

    name: str
    learning_rate: float
    beta1: float | None


def build_methods(config: ConvergenceConfig) -> list[Method]:
    """What is compared."""
    return [
        Method("SGD", config.sgd_learning_rate, None),
        Method("AMSGrad, beta1 0.9", config.adam_learning_rate, 0.9),
        Method("AMSGrad, beta1 0", config.adam_learning_rate, 0.0),
    ]


def build_problem(config: ConvergenceConfig) -> Problem:
    """The problem, with its minimum found by an accelerated projected gradient method."""
    digits = sklearn.datasets.load_digits()
    pixels = digits.data[: config.images] / 16
    x = np.concatenate([pixels - pixels.mean(axis=0), np.ones((len(pixels), 1))], axis=1)
    y = np.eye(10)[digits.target[: config.images]]
    n, a = len(x), config.half_width
    # The Hessian of softmax cross-entropy is at most half of that of least squares.
    step = 2 / np.linalg.eigvalsh(x.T @ x / n).max()
    w = ahead = np.zeros((x.shape[1], 10))
    momentum = 1.0
    for _ in range(3000):
        loss, g = _loss_and_gradient(x, y, ahead)
        new = np.clip(ahead - step * g, -a, a)
        next_momentum = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / next_momentum * (new - w)
        w, momentum = new, next_momentum
    loss, g = _loss_and_gradient(x, y, w)
    # By convexity the minimum lies no further below than the linear part can go in the box.
    gap = float(np.sum(g * w) + a * np.abs(g).sum())
    if gap > 1e-5:
        raise cli.UserError(f"the minimum is only known to {gap:.1e}: make half-width smaller.")
    return Problem(x.astype(np.float32), y.astype(np.float32), a, float(loss) - gap)


def _loss_and_gradient(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[float, np.ndarray]:
    z = x @ w
    log_p = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))
    log_p -= z.max(1, keepdims=True)
    return float(-(y * log_p).sum() / len(x)), x.T @ (np.exp(log_p) - y) / len(x)


def run_once(
    problem: Problem,
    method: Method,
    steps: int,
    sigma: jax.Array,
    quantization: Quantization | None,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One run from zero: mean loss, and mean squares of each weight's gradient and of its noise.

    Without a ``quantization``, the noise of each weight is plus or minus ``sigma / sqrt(d)``.
    """
    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)
    n, shape = x.shape[0], (x.shape[1], y.shape[1])
    rate = method.learning_rate / steps**0.5
    each = sigma / (shape[0] * shape[1]) ** 0.5

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        w, m, v, v_max, squares, noises = carry
        log_p = jax.nn.log_softmax(x @ w)
        rows = (jnp.exp(log_p) - y) / n
        g = x.T @ rows
        if quantization is None:
            noise = each * jax.random.rademacher(key, shape, jnp.float32)
        else:
            images = rows.reshape(n, 1, 1, -1)
            noise = x.T @ (quantized_gradient(images, quantization, key).reshape(n, -1) - rows)
        estimate = g + noise
        if method.beta1 is None:
            w = w - rate * estimate
        else:
            # Reddi et al. (2018), algorithm 2: unlike optax.amsgrad, no bias correction.
            m = method.beta1 * m + (1 - method.beta1) * estimate
            v = (1 - 1 / steps) * v + estimate**2 / steps
            v_max = jnp.maximum(v_max, v)
            w = w - rate * m / (jnp.sqrt(v_max) + 1e-8)
        w = jnp.clip(w, -problem.half_width, problem.half_width)
        carry = (w, m, v, v_max, squares + g**2, noises + noise**2)
        return carry, -jnp.sum(y * log_p) / n

    zeros = jnp.zeros(shape, jnp.float32)
    (*_, squares, noises), losses = jax.lax.scan(step, (zeros,) * 6, jax.random.split(key, steps))
    return jnp.mean(losses), squares / steps, noises / steps


def summarize(
    problem: Problem, method: Method, steps: int, source: str, results: tuple[jax.Array, ...]
) -> dict[str, Any]:
    """Average regret over the runs, what was measured of the noise, and the bound for it."""
    losses, squares, noises = (np.asarray(a, np.float64) for a in results)
    regrets = losses - problem.least
    gradient, noise = (np.sqrt(a.mean(axis=0)) for a in (squares, noises))
    sigma, norm = float(np.linalg.norm(noise)), float(np.linalg.norm(gradient))
    if method.beta1 is None:
        bound = theory.sgd_regret_bound(
            sigma,
            gradient=norm,
            diameter=problem.half_width * gradient.size**0.5,  # from the start to a corner
            learning_rate=method.learning_rate,
            steps=steps,
        )
    else:
        bound = theory.amsgrad_regret_bound(
            noise,
            gradient=gradient,
            width=2 * problem.half_width,
            learning_rate=method.learning_rate,
            steps=steps,
            beta1=method.beta1,
        )
    return {
        "method": method.name,
        "noise": source,
        "sigma": sigma,
        "gradient": norm,
        "regret": float(regrets.mean()),
        "standard_error": float(regrets.std(ddof=1) / len(regrets) ** 0.5),
        "bound": bound,
    }


def fit_slope(rows: list[dict[str, Any]], ceiling: float) -> dict[str, Any]:
    """Least-squares slope of log excess regret over log sigma, and that of the bound's excess.

    The excess is over the regret without noise. Taken are the scales of noise whose excess is
    above four standard errors and at most ``ceiling``, past which the box limits it.
    """
    base, *noisy = rows
    taken = [
        row
        for row in noisy
        if 4 * row["standard_error"] < row["regret"] - base["regret"] <= ceiling
    ]
    slopes: dict[str, Any] = {"sigmas": [row["sigma"] for row in taken]}
    for name in ("regret", "bound"):
        slopes[name] = None
        if len(taken) >= 3:
            excess = [row[name] - base[name] for row in taken]
            slopes[name] = float(np.polyfit(np.log(slopes["sigmas"]), np.log(excess), 1)[0])
    last = [row for row in noisy if row["sigma"] > 0][-2:]
    slopes["bound_at_large_sigma"] = float(
        np.diff(np.log([row["bound"] for row in last]))[0]
        / np.diff(np.log([row["sigma"] for row in last]))[0]
    )
    return slopes


def main(config: ConvergenceConfig) -> None:
    """Runs the experiment."""
    began = time.perf_counter()
    problem = build_problem(config)
    folder = output_folder(config.out, "convergence")
    keys = jax.random.split(jax.random.key(config.seed), config.runs)
    ceiling = 0.25 * (float(np.log(10)) - problem.least)
    rows: list[dict[str, Any]] = []
    slopes = {}
    for method in build_methods(config):
        once = functools.partial(run_once, problem, method, config.steps)
        controlled = jax.jit(
            jax.vmap(lambda sigma, key, once=once: once(sigma, None, key), (None, 0))
        )
        series = []
        for sigma in config.sigmas:
            results = controlled(jnp.float32(sigma), keys)
            series.append(summarize(problem, method, config.steps, "controlled", results))
            print(convergence_report.line(series[-1]), flush=True)
        slopes[method.name] = fit_slope(series, ceiling)
        rows += series
        for name, quantization in QUANTIZERS.items() if config.quantizers else ():
            drawn = jax.jit(
                jax.vmap(lambda key, once=once, q=quantization: once(jnp.float32(0), q, key))
            )
            rows.append(summarize(problem, method, config.steps, name, drawn(keys)))
            print(convergence_report.line(rows[-1]), flush=True)
    found = {
        "config": {**dataclasses.asdict(config), "out": str(folder)},
        "least_loss": problem.least,
        "ceiling": ceiling,
        "rows": rows,
        "slopes": slopes,
        "all_under_bound": all(row["regret"] <= row["bound"] for row in rows),
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(folder / "results.json", found)
    tables = convergence_report.tables(found)
    write_text(folder / "table.md", to_markdown(tables))
    convergence_report.plot(found, folder / "regret.png")
    show(tables)
    print(f"\nwritten to {folder}")


if __name__ == "__main__":
    cli.run(main, ConvergenceConfig)
