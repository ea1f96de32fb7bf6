"""The bounds against runs of the algorithms, written here from their definitions."""

import numpy as np
import pytest

from fqt_jax import theory

STEPS, RUNS, D = 60, 4000, 3
WIDTH = np.array([2.0, 1.0, 0.5])
BOUND = np.array([1.0, 0.3, 2.0])  # on each coordinate of the losses' gradients


def losses(kind: str, rng) -> np.ndarray:
    """Gradients of linear losses ``f_t(x) = c_t x``, ``[STEPS, D]``."""
    if kind == "constant":
        return np.tile(BOUND * [1, -1, 1], (STEPS, 1))
    signs = rng.choice([-1, 1], size=(STEPS, D)) if kind == "random" else None
    if signs is None:
        # The counter-example of Reddi et al. to plain Adam: one large gradient in three steps.
        signs = np.where(np.arange(STEPS)[:, None] % 3 == 0, 1.0, -0.4)
    return BOUND * signs


def noise(sigma: np.ndarray, heavy: bool, rng) -> np.ndarray:
    """Zero mean and deviation ``sigma``; heavy: rare and twenty times as large, as by pruning."""
    shape = (STEPS, RUNS, D)
    if not heavy:
        return sigma * rng.choice([-1.0, 1.0], size=shape)
    p = 1 / 400
    return sigma * (rng.random(shape) < p) * rng.choice([-1.0, 1.0], size=shape) / np.sqrt(p)


def regret(c: np.ndarray, path: np.ndarray) -> float:
    """Average regret of ``path [STEPS, RUNS, D]`` on the box around zero."""
    best = -np.sum(np.abs(c.sum(axis=0)) * WIDTH / 2)
    return float((np.einsum("td,trd->r", c, path).mean() - best) / STEPS)


def sgd(c, disturbance, rate) -> np.ndarray:
    x, path = np.zeros((RUNS, D)), []
    for t in range(STEPS):
        path.append(x)
        x = np.clip(x - rate(t + 1) * (c[t] + disturbance[t]), -WIDTH / 2, WIDTH / 2)
    return np.stack(path)


def amsgrad(g: np.ndarray, rate, beta1: float, beta2: float, epsilon: float = 1e-8):
    """Runs on given gradients ``[STEPS, ..., D]``; the path and the rest of the proof's terms."""
    x, m, v, v_max = (np.zeros(g.shape[1:]) for _ in range(4))
    path, squares = [], np.zeros(g.shape[1:])
    for t in range(len(g)):
        path.append(x)
        m = beta1 * m + (1 - beta1) * g[t]
        v = beta2 * v + (1 - beta2) * g[t] ** 2
        v_max = np.maximum(v_max, v)
        s = np.sqrt(v_max) + epsilon
        squares += rate(t + 1) * m**2 / s
        x = np.clip(x - rate(t + 1) * m / s, -WIDTH / 2, WIDTH / 2)
    return np.stack(path), s, m, squares


SETTINGS = [
    (kind, sigma, heavy)
    for kind in ("constant", "random", "periodic")
    for sigma, heavy in ((0.0, False), (1.0, False), (10.0, False), (10.0, True))
]


@pytest.mark.parametrize(("kind", "sigma", "heavy"), SETTINGS)
@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
def test_regret_of_sgd_is_under_its_bound(kind, sigma, heavy, schedule, rng):
    c = losses(kind, rng)
    sigmas = sigma * np.array([1.0, 0.5, 2.0])
    rate = 0.3
    path = sgd(
        c,
        noise(sigmas, heavy, rng),
        (lambda t: rate / np.sqrt(STEPS)) if schedule == "constant" else lambda t: rate / t**0.5,
    )
    bound = theory.sgd_regret_bound(
        float(np.linalg.norm(sigmas)),
        gradient=float(np.linalg.norm(BOUND)),
        diameter=float(np.linalg.norm(WIDTH)),
        learning_rate=rate,
        steps=STEPS,
        schedule=schedule,
    )
    assert regret(c, path) <= bound


@pytest.mark.parametrize(("kind", "sigma", "heavy"), SETTINGS)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_regret_of_amsgrad_is_under_its_bounds(kind, sigma, heavy, beta1, rng):
    c = losses(kind, rng)
    sigmas = sigma * np.array([1.0, 0.5, 2.0])
    g = c[:, None] + noise(sigmas, heavy, rng)
    options = {
        "gradient": BOUND,
        "width": WIDTH,
        "learning_rate": 0.7,
        "steps": STEPS,
        "beta1": beta1,
    }
    path, *_ = amsgrad(g, lambda t: 0.7 / np.sqrt(STEPS), beta1, 1 - 1 / STEPS)
    assert regret(c, path) <= theory.amsgrad_regret_bound(sigmas, **options)
    path, *_ = amsgrad(g, lambda t: 0.7 / np.sqrt(t), beta1, 0.99)
    bound = theory.amsgrad_bounded_noise_regret_bound(
        sigmas, largest_noise=sigmas * (20 if heavy else 1), beta2=0.99, **options
    )
    assert regret(c, path) <= bound


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("beta2", [0.0, 0.9, 1 - 1 / STEPS])
def test_the_steps_of_the_proof_hold_on_every_path(beta1, beta2, rng):
    """Lemmas 2 to 4 of docs/theory.md, for gradients of any kind, not only on average."""
    kinds = [
        rng.normal(size=(STEPS, 200, D)),
        rng.standard_cauchy(size=(STEPS, 200, D)),
        rng.normal(size=(STEPS, 200, D)) * (rng.random((STEPS, 200, D)) < 0.1) + 0.2,
        np.broadcast_to(losses("periodic", rng)[:, None], (STEPS, 200, D)),
    ]
    for g in kinds:
        for decreasing in (False, True):

            def rate(t, decreasing=decreasing):
                return 0.7 / np.sqrt(t if decreasing else STEPS)

            path, s, m, squares = amsgrad(g, rate, beta1, beta2)
            # The worst comparator of a linearized regret is a corner of the box.
            linear = (g * path).sum(axis=(0, 2)) + (np.abs(g.sum(axis=0)) * WIDTH / 2).sum(axis=1)
            later = (1 + beta1) / (2 * (1 - beta1)) * squares
            last = beta1 / (1 - beta1) * WIDTH * np.abs(m)
            lemma2 = (WIDTH**2 * s / (2 * rate(STEPS)) + later + last).sum(axis=1)
            assert np.all(linear <= lemma2 * (1 + 1e-9))
            steps = np.array([rate(t + 1) for t in range(STEPS)]).reshape(-1, 1, 1)
            lemma3 = (steps * np.abs(g)).sum(axis=0) / np.sqrt(1 - beta2)
            assert np.all(squares <= lemma3 * (1 + 1e-9))
            if beta2 == 1 - 1 / STEPS and not decreasing:
                lemma4 = 2 * 0.7 * np.sqrt(np.e) * np.sqrt((g**2).sum(axis=0))
                assert np.all(squares <= lemma4 * (1 + 1e-9))
                assert np.all((s - 1e-8) ** 2 <= (g**2).mean(axis=0) * (1 + 1e-6))


def test_growth_in_sigma():
    sgd_options = {"gradient": 1.0, "diameter": 1.0, "learning_rate": 1.0, "steps": 100}
    at = [theory.sgd_regret_bound(sigma, **sgd_options) for sigma in (1e3, 1e4)]
    assert at[1] / at[0] == pytest.approx(100, rel=1e-3)
    at = [
        theory.tuned_sgd_regret_bound(sigma, gradient=1.0, diameter=1.0, steps=100)
        for sigma in (1e3, 1e4)
    ]
    assert at[1] / at[0] == pytest.approx(10, rel=1e-3)
    options = {"gradient": BOUND, "width": WIDTH, "learning_rate": 1.0, "steps": 100}
    at = [theory.amsgrad_regret_bound(sigma, **options) for sigma in (1e3, 1e4)]
    assert at[1] / at[0] == pytest.approx(10, rel=1e-3)


def test_tuned_sgd_is_the_least_bound():
    rates = np.geomspace(1e-3, 1e1, 2001)
    bounds = [
        theory.sgd_regret_bound(3.0, gradient=4.0, diameter=2.0, learning_rate=r, steps=25)
        for r in rates
    ]
    assert min(bounds) == pytest.approx(2 * 5 / 5, rel=1e-5)
    tuned = theory.tuned_sgd_regret_bound(3.0, gradient=4.0, diameter=2.0, steps=25)
    assert tuned == pytest.approx(2.0)


def test_the_bounds_are_the_formulas_of_the_theorems():
    """By hand, for two coordinates: h is 5 and 13."""
    options = {
        "gradient": [3.0, 5.0],
        "width": [2.0, 1.0],
        "learning_rate": 0.5,
        "steps": 100,
        "beta1": 0.75,
        "epsilon": 0.1,
    }
    root = np.sqrt(np.e)
    theorem_a = (
        5 * (4 / 1 + 7 * root * 0.5 + 0.75 / 0.5 * 2) + 4 * 0.1
        + 13 * (1 / 1 + 7 * root * 0.5 + 0.75 / 0.5 * 1) + 1 * 0.1
    ) / 10  # fmt: skip
    assert theory.amsgrad_regret_bound([4.0, 12.0], **options) == pytest.approx(theorem_a)
    theorem_b = (
        4 * (3 + 6 + 0.1) + 7 * 0.5 * 5 / 0.2 + 3 * 2 * 5 / 10
        + 1 * (5 + 20 + 0.1) + 7 * 0.5 * 13 / 0.2 + 3 * 1 * 13 / 10
    ) / 10  # fmt: skip
    got = theory.amsgrad_bounded_noise_regret_bound(
        [4.0, 12.0], largest_noise=[6.0, 20.0], beta2=0.96, **options
    )
    assert got == pytest.approx(theorem_b)


def test_coordinates_add_up():
    options = {"width": 1.0, "learning_rate": 1.0, "steps": 10}
    one = theory.amsgrad_regret_bound(2.0, gradient=1.0, **options)
    assert theory.amsgrad_regret_bound(2.0, gradient=np.ones(7), **options) == pytest.approx(
        7 * one
    )


def test_errors():
    options = {"gradient": 1.0, "width": 1.0, "learning_rate": 1.0, "steps": 10}
    for bad in ({"steps": 1}, {"learning_rate": 0.0}, {"beta1": 1.0}, {"width": -1.0}):
        with pytest.raises(ValueError, match=r"must"):
            theory.amsgrad_regret_bound(1.0, **{**options, **bad})
    with pytest.raises(ValueError, match="beta"):
        theory.amsgrad_bounded_noise_regret_bound(1.0, largest_noise=1.0, beta2=1.0, **options)
    sgd_options = {"gradient": 1.0, "diameter": 1.0, "learning_rate": 1.0, "steps": 10}
    for bad in ({"steps": 0}, {"learning_rate": -1.0}, {"diameter": -1.0}, {"schedule": "cosine"}):
        with pytest.raises(ValueError, match=r"must"):
            theory.sgd_regret_bound(1.0, **{**sgd_options, **bad})
