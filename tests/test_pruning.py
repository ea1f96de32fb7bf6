import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fqt_jax import SAMPLERS, GradientQuantizer, keep_probabilities, prune
from tests import reference

KEY = jax.random.key(3)
DRAWS = 10_000
UNBIASED = [name for name, sampler in SAMPLERS.items() if sampler.unbiased]
probabilities = jax.jit(keep_probabilities)
compiled = jax.jit(prune, static_argnames=("keep", "sampler", "importance", "axis"))


# Keep probabilities

importances = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(
            st.one_of(
                st.sampled_from([0.0, 1.0, 2.0]),
                st.floats(-30, 30).map(lambda e: 10.0**e),
                st.floats(0.0078125, 8.0),
            ),
            min_size=n,
            max_size=n,
        ),
        st.integers(0, n),
    )
)


@settings(max_examples=150)
@given(importances)
@example(([1e30, 1e-30, 3e-30], 2))
@example(([1e30, 1e30, 1e-30, 1e-30, 2e-30, 4e-30], 5))
@example(([1e30, 1e-30, 0.0], 2))
@example(([1.0] * 7, 3))
@example(([0.0] * 4, 2))
@example(([0.0, 0.0, 5.0, 0.0], 3))
@example(([3.0, 1.0, 2.0], 1))
@example(([3.0, 1.0, 2.0], 3))
@example(([3.0], 1))
@example(([0.0], 1))
def test_probabilities_are_the_water_filling(case):
    r, k = np.array(case[0], np.float32), case[1]
    p = np.asarray(probabilities(r, k), np.float64)
    np.testing.assert_allclose(
        p, reference.keep_probabilities(r, k), rtol=1e-5, atol=1e-30, err_msg=str(case)
    )
    assert p.min() >= 0
    assert p.max() <= 1
    np.testing.assert_allclose(p.sum(), k, rtol=1e-5)
    assert np.all(np.diff(p[np.argsort(r, kind="stable")]) >= 0)
    assert len(np.unique(p)) <= len(np.unique(r))


@pytest.mark.parametrize("k", [0, 1, 2, 4])
def test_all_zero_importance_is_spread_evenly(k):
    np.testing.assert_array_equal(keep_probabilities(jnp.zeros(4), k), np.full(4, k / 4))


def test_probabilities_of_a_long_vector(rng):
    r = (rng.lognormal(sigma=3, size=5000)).astype(np.float32)
    p = keep_probabilities(jnp.asarray(r), 1250)
    np.testing.assert_allclose(p, reference.keep_probabilities(r, 1250), rtol=1e-4)


def test_nan_importance_gives_nan_probabilities():
    assert np.isnan(keep_probabilities(jnp.array([1.0, jnp.nan, 2.0, 3.0]), 2)).all()


def test_probabilities_of_nothing():
    assert keep_probabilities(jnp.zeros(0), 0).shape == (0,)


def test_probabilities_under_vmap_and_jit(rng):
    r = jnp.asarray(rng.random((3, 6)), jnp.float32)
    batched = jax.jit(jax.vmap(lambda r: keep_probabilities(r, 2)))(r)
    apart = np.stack([reference.keep_probabilities(row, 2) for row in np.asarray(r)])
    np.testing.assert_allclose(batched, apart, rtol=1e-5)


def test_probability_errors():
    with pytest.raises(TypeError, match="floating-point"):
        keep_probabilities(jnp.arange(3), 1)
    with pytest.raises(ValueError, match="one axis"):
        keep_probabilities(jnp.ones((2, 2)), 1)
    for k in (-1, 4):
        with pytest.raises(ValueError, match=f"0 to the number of groups, 3; got {k}"):
            keep_probabilities(jnp.ones(3), k)


# Samplers


def gradient(rng, n=8, m=6) -> np.ndarray:
    """Rows of very different size, of which some are certain to be kept."""
    sizes = np.geomspace(0.3, 8, n)[rng.permutation(n), None]
    return (sizes * rng.normal(size=(n, m))).astype(np.float32)


def row_importance(g: np.ndarray, importance: str) -> np.ndarray:
    rows = g.reshape(g.shape[0], -1).astype(np.float64)
    if importance == "norm":
        return np.sqrt((rows**2).sum(1))
    return np.maximum(rows.max(1), 0) - np.minimum(rows.min(1), 0)


def draw_many(g, draws=DRAWS, **options):
    """The weight of every group in each of many draws, and the selections themselves."""
    keys = jax.random.split(jax.random.key(17), draws)

    def one(key):
        selection = prune(g, key=key, **options)
        return selection.expand(), selection

    weights, selections = jax.jit(jax.vmap(one))(keys)
    return np.asarray(weights), selections


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_indices_are_distinct_increasing_and_as_many_as_promised(sampler, keep, rng):
    g = gradient(rng, n=9)
    weights, selections = draw_many(g, draws=2000, keep=keep, sampler=sampler)
    k = GradientQuantizer(keep=keep).kept(9)
    indices = np.asarray(selections.indices)
    assert selections.size == 9
    assert indices.shape == (2000, k if SAMPLERS[sampler].exact else 9)
    assert indices.min() >= 0
    assert indices.max() < 9
    assert np.all(np.diff(indices, axis=1) > 0)
    counts = (weights != 0).sum(axis=1)
    if not SAMPLERS[sampler].exact:
        assert len(np.unique(counts)) > 1
        assert abs(counts.mean() - k) < 4 * counts.std() / np.sqrt(2000)
    else:
        np.testing.assert_array_equal(counts, k)


def assert_unbiased(g, sampler, importance="range"):
    """Mean and total variance of the pruned gradient against the closed forms."""
    weights, _ = draw_many(g, keep=0.4, sampler=sampler, importance=importance)
    n = g.shape[0]
    k = GradientQuantizer(keep=0.4).kept(n)
    if sampler == "uniform":
        p = np.full(n, k / n)
    else:
        p = reference.keep_probabilities(row_importance(g, importance), k)
    variance = reference.mask_variance(g, p[:, None])
    draws = weights[:, :, None] * g.astype(np.float64)
    reference.assert_mean(draws, g, variance, floor=1e-5 * np.abs(g))
    reference.assert_total_variance(draws, variance.sum())


@pytest.mark.parametrize("importance", ["range", "norm"])
@pytest.mark.parametrize("sampler", UNBIASED)
def test_unbiased_with_the_variance_of_the_formula(sampler, importance, rng):
    assert_unbiased(gradient(rng), sampler, importance)


def test_topk_fails_the_test_that_the_others_pass(rng):
    with pytest.raises(AssertionError, match="mean is off"):
        assert_unbiased(gradient(rng), "topk")


@pytest.mark.parametrize("sampler", UNBIASED)
def test_constant_groups_are_not_lost(sampler):
    """Their range is zero, their gradient is not."""
    g = np.repeat(np.float32([[3.0], [-1.0], [0.5], [1.0], [2.0]]), 4, axis=1)
    assert_unbiased(g, sampler)


@pytest.mark.parametrize("sampler", ["systematic", "bernoulli"])
def test_marginals_are_the_keep_probabilities(sampler, rng):
    g = gradient(rng)
    weights, _ = draw_many(g, keep=0.5, sampler=sampler)
    p = reference.keep_probabilities(row_importance(g, "range"), 4)
    reference.assert_mean(weights != 0, p, p * (1 - p), floor=1e-6)
    kept = weights != 0
    np.testing.assert_allclose(weights[kept], np.broadcast_to(1 / p, kept.shape)[kept], rtol=1e-5)


def test_certain_groups_are_always_kept_with_weight_one():
    g = np.float32([[9, -9], [0, 0], [0.1, -0.1], [0.1, 0.1], [8, -8]])
    for sampler in ("systematic", "bernoulli"):
        weights, _ = draw_many(g, draws=500, keep=0.6, sampler=sampler)
        np.testing.assert_array_equal(weights[:, [0, 4]], 1)
        np.testing.assert_array_equal(weights[:, 1], 0)


def test_topk_keeps_the_largest_absolute_entries():
    g = np.float32([[1, 2], [-9, 0], [3, 3], [0, 0], [-4, -4]])
    kept = prune(g, key=KEY, keep=0.4, sampler="topk")
    np.testing.assert_array_equal(kept.indices, [1, 4])
    np.testing.assert_array_equal(kept.weights, [1, 1])
    np.testing.assert_array_equal(kept.expand(), [0, 1, 0, 0, 1])


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("importance", ["range", "norm"])
def test_the_size_of_the_gradient_does_not_matter(importance, scale, rng):
    g = np.abs(gradient(rng))
    options = {"key": KEY, "keep": 0.5, "importance": importance}
    plain = compiled(jnp.asarray(g), **options)
    scaled = compiled(jnp.asarray(g * np.float32(scale)), **options)
    np.testing.assert_array_equal(plain.indices, scaled.indices)
    np.testing.assert_allclose(plain.weights, scaled.weights, rtol=1e-5)


@pytest.mark.parametrize("importance", ["range", "norm"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_all_zero_gradient_stays_zero(sampler, importance):
    g = jnp.zeros((6, 3))
    kept = compiled(g, key=KEY, keep=0.5, sampler=sampler, importance=importance)
    assert np.isfinite(kept.weights).all()
    np.testing.assert_array_equal(kept.expand()[:, None] * g, g)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_fewer_groups_than_bits_keep_one(sampler, rng):
    g = gradient(rng, n=3)
    weights, selections = draw_many(g, draws=200, keep=1 / 8, sampler=sampler)
    if SAMPLERS[sampler].exact:
        assert selections.indices.shape == (200, 1)
        np.testing.assert_array_equal((weights != 0).sum(1), 1)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_a_single_group_is_kept_as_it_is(sampler, value):
    kept = prune(jnp.full((1, 4), value), key=KEY, keep=0.1, sampler=sampler)
    np.testing.assert_array_equal(kept.indices, [0])
    np.testing.assert_array_equal(kept.weights, [1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_keeping_everything(sampler, rng):
    kept = prune(gradient(rng), key=KEY, keep=1.0, sampler=sampler)
    np.testing.assert_array_equal(kept.indices, np.arange(8))
    np.testing.assert_array_equal(kept.weights, np.ones(8))


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_empty_gradients(sampler, shape):
    kept = prune(jnp.zeros(shape), key=KEY, keep=0.5, sampler=sampler)
    assert kept.expand().shape == shape[:1]
    assert np.isfinite(kept.weights).all()


@pytest.mark.parametrize("sampler", ["systematic", "bernoulli"])
def test_nan_is_never_pruned_away(sampler, rng):
    g = gradient(rng)
    g[5, 1] = np.nan
    kept = prune(g, key=KEY, keep=0.25, sampler=sampler)
    assert np.isnan(kept.weights).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("axis", [1, -1, -2])
def test_axis(sampler, axis, rng):
    g = gradient(rng).reshape(2, 4, 6)
    along = compiled(g, key=KEY, keep=0.5, sampler=sampler, axis=axis)
    moved = compiled(np.moveaxis(g, axis, 0), key=KEY, keep=0.5, sampler=sampler)
    assert along.size == g.shape[axis]
    np.testing.assert_array_equal(along.indices, moved.indices)
    np.testing.assert_array_equal(along.weights, moved.weights)


def test_bfloat16_gradient(rng):
    g = jnp.asarray(gradient(rng), jnp.bfloat16)
    kept = prune(g, key=KEY, keep=0.5)
    assert kept.weights.dtype == jnp.float32


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_jit_and_vmap_change_nothing(sampler, rng):
    g = jnp.stack([jnp.asarray(gradient(rng)) for _ in range(3)])
    keys = jax.random.split(KEY, 3)

    def one(g, key):
        return prune(g, key=key, keep=0.5, sampler=sampler)

    batched = jax.jit(jax.vmap(one))(g, keys)
    for i in range(3):
        alone = one(g[i], keys[i])
        np.testing.assert_array_equal(batched.indices[i], alone.indices)
        np.testing.assert_allclose(batched.weights[i], alone.weights, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keep": 0}, ValueError, "keep must be"),
        ({"keep": 1.5}, ValueError, "keep must be"),
        ({"keep": "half"}, TypeError, "keep must be"),
        ({"sampler": "best"}, ValueError, "sampler must be one of"),
        ({"importance": "mean"}, ValueError, "importance must be one of"),
        ({"axis": 2}, ValueError, "axis 2 is outside the 2 axes"),
        ({"axis": -3}, ValueError, "axis -3 is outside"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        prune(jnp.ones((4, 2)), **{"key": KEY, "keep": 0.5, **change})


def test_integers_are_rejected():
    with pytest.raises(TypeError, match="floating-point"):
        prune(jnp.ones((4, 2), jnp.int32), key=KEY, keep=0.5)
