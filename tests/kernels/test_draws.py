"""Keep probabilities and systematic draws, by every implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fqt_jax as fqt
from fqt_jax import kernels
from tests import reference
from tests.kernels import operations

IMPLEMENTATIONS = operations.each_of("water_filling", "systematic")
each = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
FLOATS = np.finfo(np.float32)


@functools.partial(jax.jit, static_argnames="implementation")
def filled(r: np.ndarray, k: int, implementation: str) -> jax.Array:
    return kernels.water_filling(r, k, implementation=implementation)


@functools.partial(jax.jit, static_argnames=("k", "implementation"))
def drawn(p: np.ndarray, k: int, seed: np.ndarray, implementation: str) -> fqt.Selection:
    return kernels.systematic(p, k, seed, implementation=implementation)


def importances(rng: np.random.Generator, kind: str, n: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        r = rng.lognormal(sigma={"even": 0.1, "wide": 4, "extreme": 40}.get(kind, 1), size=n)
        r = r.astype(np.float32)
    if kind == "equal":
        r = rng.integers(0, 3, n).astype(np.float32)
    if kind == "sparse":
        r[rng.random(n) < 0.8] = 0
    if kind == "tiny":
        r *= 2 * FLOATS.tiny
    if kind == "special":
        r[rng.integers(n)] = rng.choice([np.nan, np.inf, FLOATS.max])
    return r


KINDS = ("even", "wide", "extreme", "equal", "sparse", "tiny", "special")
SIZES = st.sampled_from([1, 2, 3, 7, 8, 9, 16, 64, 127, 128, 129, 500, 4096])
SEEDS = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(n=SIZES, kind=st.sampled_from(KINDS), seed=SEEDS)
@example(n=1, kind="special", seed=0)
@example(n=4096, kind="extreme", seed=0)
def test_all_implementations_give_the_same_bits(n, kind, seed):
    rng = np.random.default_rng(seed)
    r, k = importances(rng, kind, n), int(rng.integers(0, n + 1))
    p = [np.asarray(filled(r, k, name)) for name in IMPLEMENTATIONS]
    words = rng.integers(0, 2**32, 2, np.uint32)
    draws = [drawn(p[0], k, words, name) for name in IMPLEMENTATIONS]
    for other, draw in zip(p[1:], draws[1:], strict=True):
        np.testing.assert_array_equal(p[0], other)
        np.testing.assert_array_equal(draws[0].indices, draw.indices)
        np.testing.assert_array_equal(draws[0].weights, draw.weights)


@each
@settings(deadline=None)
@given(n=SIZES, kind=st.sampled_from(["even", "wide", "equal", "sparse"]), seed=SEEDS)
def test_probabilities_are_the_water_filling(implementation, n, kind, seed):
    rng = np.random.default_rng(seed)
    r, k = importances(rng, kind, n), int(rng.integers(0, n + 1))
    p = np.asarray(filled(r, k, implementation), np.float64)
    np.testing.assert_allclose(p, reference.keep_probabilities(r, k), rtol=1e-5, atol=1e-30)


def reference_draw(p: np.ndarray, k: int, seed: int) -> tuple[list[int], list[float]]:
    """By whole numbers of any size: a group is kept where its end passes a multiple of 2^32."""
    end, kept = seed, []
    for i, p_i in enumerate(p.astype(np.float64)):
        certain = p_i >= 1
        start = end
        end += max(1, int(p_i * 2**32)) if 0 < p_i < 1 else 0
        if certain or end >> 32 > start >> 32:
            kept.append(i)
    others = [i for i in range(len(p)) if i not in kept]
    indices = sorted(kept[:k] + others[: max(0, k - len(kept))])
    weights = [1 / p[i] if i in kept else 0 for i in indices]
    return indices, [np.nan if np.isnan(p[i]) else w for i, w in zip(indices, weights, strict=True)]


@each
@settings(deadline=None)
@given(
    p=st.lists(
        st.sampled_from([0.0, 1e-20, 1e-9, 0.1, 0.25, 0.5, 0.9, 1.0, np.nan]),
        min_size=1,
        max_size=12,
    ),
    of_k=st.floats(0, 1),
    seed=SEEDS,
)
@example(p=[0.5, 0.5], of_k=1, seed=0)  # fewer are kept than asked for
@example(p=[1.0, 1.0, 1.0], of_k=0.4, seed=0)  # more
@example(p=[np.nan, np.nan], of_k=0.5, seed=0)
def test_draws_are_those_of_whole_numbers(implementation, p, of_k, seed):
    p, k = np.array(p, np.float32), round(of_k * len(p))
    selection = drawn(p, k, np.array([seed, 1], np.uint32), implementation)
    indices, weights = reference_draw(p, k, seed)
    assert selection.indices.tolist() == indices
    # Of probabilities that are less than a unit, the weight is that of a unit.
    np.testing.assert_allclose(selection.weights, np.minimum(weights, 2.0**32), rtol=1e-6)


@each
def test_many_small_probabilities_lose_nothing(implementation):
    """A running sum in float32 would not see them: 2^-26 beside a half."""
    n = 2**16
    p = np.full(n, 2.0**-26, np.float32)
    p[0] = 0.5
    kept = drawn(p, 1, np.array([2**31 - 2**20, 0], np.uint32), implementation)
    assert kept.indices.tolist() == [2**20 // 64]
    assert kept.weights.tolist() == [2.0**26]


@each
def test_mapped_over_seeds_and_importances(implementation):
    rng = np.random.default_rng(0)
    r = jnp.asarray(rng.random((3, 9)), jnp.float32)
    seeds = jnp.asarray(rng.integers(0, 2**32, (3, 2), np.uint32))

    def draw(r, seed):
        p = kernels.water_filling(r, 4, implementation=implementation)
        return kernels.systematic(p, 4, seed, implementation=implementation)

    mapped = jax.jit(jax.vmap(draw))(r, seeds)
    for i in range(3):
        one = draw(r[i], seeds[i])
        np.testing.assert_array_equal(mapped.indices[i], one.indices)
        np.testing.assert_array_equal(mapped.weights[i], one.weights)


def test_probabilities_have_a_derivative_and_draws_none():
    r = jnp.array([1.0, 0.5, 0.25, 0.25, 3.0])
    slope = jax.jacobian(lambda r: fqt.keep_probabilities(r, 2))(r)
    # Nothing but the largest is capped: p_i = r_i / sum(r) of the others.
    rest = np.array([1, 0.5, 0.25, 0.25])
    expected = np.eye(4) / rest.sum() - rest[:, None] / rest.sum() ** 2
    np.testing.assert_allclose(slope[:4, :4], expected, atol=1e-6)
    np.testing.assert_array_equal(slope[4], 0)

    def kept(g):
        return fqt.prune(g, key=jax.random.key(0), keep=0.5).expand().sum()

    np.testing.assert_array_equal(jax.grad(kept)(jnp.ones((4, 3)) * r[:4, None]), 0)


SEED = jnp.zeros(2, jnp.uint32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.water_filling(jnp.zeros((2, 2)), 1), r"float32\[n\]; got float32\[2, 2\]"),
        (lambda: kernels.water_filling(jnp.zeros(2, jnp.int32), 1), r"float32\[n\]; got int32"),
        (lambda: kernels.systematic(jnp.zeros((2, 2)), 1, SEED), r"p must be float32\[n\]"),
        (lambda: kernels.systematic(jnp.zeros(2), 3, SEED), "from 0 to the number of groups, 2"),
        (lambda: kernels.systematic(jnp.zeros(2), -1, SEED), "number of groups, 2; got -1"),
        (lambda: kernels.systematic(jnp.zeros(2), 1, SEED[:1]), r"seed must be uint32\[2\]"),
    ],
)
def test_wrong_operands(call, message):
    with pytest.raises(ValueError, match=message):
        call()
