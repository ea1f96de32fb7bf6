import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli, convergence
from experiments.convergence import ConvergenceConfig, Method, build_problem, fit_slope, run_once
from fqt_jax import theory

TINY = {"images": 40, "steps": 30, "runs": 2, "sigmas": (0.0, 0.5, 1.0), "quantizers": False}


pytestmark = pytest.mark.usefixtures("relaxed_promotion", "own_folder")


def loss_and_gradient(problem, w):
    z = np.float64(problem.x) @ w
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    loss = -np.log((p * problem.y).sum(axis=1)).mean()
    return loss, np.float64(problem.x).T @ (p - problem.y) / len(z)


def test_the_minimum_is_a_lower_bound_that_is_reached():
    problem = build_problem(ConvergenceConfig(**TINY))
    assert problem.x.shape == (40, 65)
    w = np.zeros((65, 10))
    for _ in range(4000):
        w = np.clip(w - 0.5 * loss_and_gradient(problem, w)[1], -0.5, 0.5)
    loss, g = loss_and_gradient(problem, w)
    gap = (g * w).sum() + 0.5 * np.abs(g).sum()
    assert gap < 3e-3
    assert loss - gap - 1e-5 <= problem.least <= loss


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_a_run_without_noise_is_the_algorithm(beta1):
    problem = build_problem(ConvergenceConfig(**TINY))
    rate, steps = (5.0 if beta1 is None else 0.3), 30
    w, m, v, v_max = (np.zeros((65, 10)) for _ in range(4))
    losses, squares = [], 0.0
    for _ in range(steps):
        loss, g = loss_and_gradient(problem, w)
        losses.append(loss)
        squares += (g**2).sum() / steps
        m = (beta1 or 0) * m + (1 - (beta1 or 0)) * g
        v = (1 - 1 / steps) * v + g**2 / steps
        v_max = np.maximum(v_max, v)
        move = g if beta1 is None else m / (np.sqrt(v_max) + 1e-8)
        w = np.clip(w - rate / np.sqrt(steps) * move, -0.5, 0.5)
    method = Method("", rate, beta1)
    run = jax.jit(lambda sigma, key: run_once(problem, method, steps, sigma, None, key))
    loss, square, noise = run(jnp.float32(0), jax.random.key(0))
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-4)
    assert float(square.sum()) == pytest.approx(squares, rel=1e-3)
    assert float(noise.sum()) == 0
    *_, noise = run(jnp.float32(2), jax.random.key(0))
    np.testing.assert_allclose(noise, 4 / 650, rtol=1e-4)


def test_the_noise_of_a_quantizer_has_the_predicted_size():
    """PSQ's error of the first step's gradient, carried through the product with the images."""
    problem = build_problem(ConvergenceConfig(**TINY))
    psq = convergence.QUANTIZERS["PSQ, 1 bit"]
    method = Method("", 1e-9, None)  # stays at the start
    run = jax.jit(lambda key: run_once(problem, method, 400, jnp.float32(0), psq, key))
    *_, noise = run(jax.random.key(0))
    rows = (0.1 - problem.y) / 40
    variance = theory.rounding_variance(rows, 1, axis=0)
    expected = (np.float64(problem.x).T ** 2 @ variance).sum()
    assert float(noise.sum()) == pytest.approx(expected, rel=0.05)


def test_slopes_are_those_of_a_power_law():
    def row(sigma, power):
        return {
            "sigma": sigma, "regret": 1 + 0.1 * sigma**power, "bound": 2 + sigma**power,
            "standard_error": 1e-4,
        }  # fmt: skip

    for power in (1, 2):
        rows = [row(sigma, power) for sigma in (0.0, 1e-6, 0.1, 0.3, 1.0, 2.0, 100.0)]
        slopes = fit_slope(rows, ceiling=0.5)
        assert slopes["sigmas"] == [0.1, 0.3, 1.0, 2.0]
        assert slopes["regret"] == pytest.approx(power)
        assert slopes["bound"] == pytest.approx(power)
    assert fit_slope(rows[:3], ceiling=0.5)["regret"] is None


def test_the_methods_are_those_that_the_bounds_are_for():
    methods = convergence.build_methods(ConvergenceConfig(**TINY))
    assert [method.beta1 for method in methods] == [None, 0.9, 0.0]


def test_the_experiment_writes_its_folder(capsys, monkeypatch):
    methods = convergence.build_methods(ConvergenceConfig(**TINY))
    monkeypatch.setattr(convergence, "build_methods", lambda _: methods[1:2])
    convergence.main(ConvergenceConfig(**TINY, out=pathlib.Path("run")))
    found = json.loads(pathlib.Path("run/results.json").read_text())
    assert len(found["rows"]) == 3
    assert found["all_under_bound"]
    assert all(0 < row["regret"] < row["bound"] for row in found["rows"])
    assert pathlib.Path("run/regret.png").read_bytes().startswith(b"\x89PNG")
    assert "all 3 regrets are under their bounds" in pathlib.Path("run/table.md").read_text()
    assert "AMSGrad, beta1 0.9" in capsys.readouterr().out
    with pytest.raises(cli.UserError, match="exists already"):
        convergence.main(ConvergenceConfig(**TINY, out=pathlib.Path("run")))


def test_bad_options_are_named():
    for bad in (
        {"steps": 1},
        {"sigmas": (1.0, 2.0, 3.0)},
        {"sigmas": (0.0, 1.0)},
        {"images": 5000},
        {"half_width": 0.0},
    ):
        with pytest.raises(cli.UserError, match="must be"):
            ConvergenceConfig(**{**TINY, **bad})
