import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqt_jax import rounding, stochastic_round
from tests import reference

KEY = jax.random.key(7)
DRAWS = 10_000


def words(n: int) -> st.SearchStrategy:
    return st.tuples(*[st.integers(0, 2**32 - 1)] * n)


# The counter hash


@settings(max_examples=60)
@given(words(2), st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8))
def test_hash_is_exact(seed, index):
    got = rounding.counter_bits(jnp.array(seed, jnp.uint32), jnp.array(index, jnp.uint32))
    assert got.dtype == jnp.uint32
    np.testing.assert_array_equal(got, reference.counter_bits(np.array(seed), np.array(index)))


def stream(seed: tuple[int, int], n: int, start: int = 0) -> np.ndarray:
    index = jnp.arange(start, start + n, dtype=jnp.uint32)
    return np.asarray(rounding.counter_bits(jnp.array(seed, jnp.uint32), index))


@pytest.mark.parametrize("seed", [(0, 0), (1, 0), (0, 1), (0x12345678, 0x9ABCDEF0)])
@pytest.mark.parametrize("shift", [24, 16, 0])
def test_hash_is_uniform(seed, shift):
    """Chi-square of 256 bins at the top byte, the one below it, and the bottom byte."""
    n = 1 << 16
    counts = np.bincount((stream(seed, n) >> np.uint32(shift)) & 255, minlength=256)
    chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum()
    degrees = 255
    assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("lag", [0, 1, -1, 1000])
def test_streams_of_other_keys_are_unrelated(lag):
    """Neither the streams of one key nor those of neighbouring keys, shifted or not."""
    n = 1 << 12
    seeds = [
        tuple(np.asarray(seed).tolist())
        for word in range(4)
        for seed in rounding.seeds_from_key(jax.random.key(word), 4)
    ]
    a = np.stack([stream(seed, n, start=2000) for seed in seeds]) / 2**32
    b = np.stack([stream(seed, n, start=2000 + lag) for seed in seeds]) / 2**32
    correlation = np.corrcoef(a, b)[: len(seeds), len(seeds) :]
    unrelated = np.ones_like(correlation, bool) if lag else ~np.eye(len(seeds), dtype=bool)
    assert np.abs(correlation[unrelated]).max() < 4.5 / math.sqrt(n)


@pytest.mark.parametrize("flipped", range(0, 32, 5))
def test_a_bit_of_the_first_seed_word_changes_everything(flipped):
    n = 1 << 14
    a, b = (stream((first, 7), n) / 2**32 for first in (5, 5 ^ (1 << flipped)))
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(n)


@pytest.mark.parametrize("lag", [1, 2, 32, 1024])
def test_a_stream_is_not_correlated_with_itself(lag):
    n = 1 << 14
    a, b = stream((5, 7), n) / 2**32 - 0.5, stream((5, 7), n, start=lag) / 2**32 - 0.5
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(n)


def test_seeds_from_key_differ_and_repeat():
    seeds = np.stack(rounding.seeds_from_key(KEY, 4))
    assert seeds.shape == (4, 2)
    assert seeds.dtype == np.uint32
    assert len(np.unique(seeds)) == 8
    np.testing.assert_array_equal(seeds, np.stack(rounding.seeds_from_key(KEY, 4)))
    assert not np.array_equal(seeds, np.stack(rounding.seeds_from_key(jax.random.key(8), 4)))


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (2, 3, 4), (1, 7, 1, 2)])
def test_flat_index_is_c_order(shape):
    index = rounding.flat_index(shape)
    assert index.dtype == jnp.uint32
    np.testing.assert_array_equal(index, np.arange(math.prod(shape)).reshape(shape))


# Codes


@st.composite
def groups(draw):
    """Rows of float32 that are ordinary, huge, tiny, constant, far from zero, or of one entry."""
    n, m = draw(st.sampled_from([(1, 1), (3, 9), (4, 32)]))  # few shapes: each one compiles
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([1.0, 1e-3, 1e30, 1e-25, 1e-35, 0.0]))
    offset = draw(st.sampled_from([0.0, 1.0, -1000.0]))
    return (scale * (rng.normal(size=(n, m)) + offset)).astype(np.float32)


def rounding_parts(g: jax.Array, seed: jax.Array, bits: int):
    lo = g.min(axis=1, keepdims=True)
    value_range = rounding.clamp_range(g.max(axis=1, keepdims=True) - lo)
    scale = rounding.code_scale(value_range, bits)
    index = rounding.flat_index(g.shape)
    return value_range, rounding.round_to_codes(g, lo, scale, seed, index, bits)


@settings(max_examples=40)
@given(groups(), words(2), st.integers(1, 8))
def test_codes_are_exactly_the_specified_ones(g, seed, bits):
    seed = np.array(seed, np.uint32)
    value_range, codes = jax.jit(rounding_parts, static_argnums=2)(g, seed, bits)
    lo = g.min(axis=1, keepdims=True)
    expected_range = np.maximum(g.max(axis=1, keepdims=True) - lo, np.float32(2.0**-100))
    np.testing.assert_array_equal(value_range, expected_range)
    index = np.arange(g.size).reshape(g.shape)
    expected = reference.codes(g, lo, reference.code_scale(expected_range, bits), seed, index, bits)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, expected)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1


@settings(max_examples=20)
@given(groups(), st.sampled_from([1, 4]))
def test_rounded_values_are_the_codes_values(g, bits):
    rounded = jax.jit(stochastic_round, static_argnames="bits")(g, key=KEY, bits=bits)
    (seed,) = rounding.seeds_from_key(KEY, 1)
    value_range, codes = jax.jit(rounding_parts, static_argnums=2)(g, seed, bits)
    step = np.asarray(value_range, np.float64) / (2**bits - 1)
    expected = g.min(axis=1, keepdims=True) + np.asarray(codes, np.float64) * step
    largest = np.abs(g).max(axis=1, keepdims=True) + np.asarray(value_range)
    assert np.all(np.abs(rounded - expected) <= 4e-7 * largest)


# Statistics of stochastic_round


def draw_many(g: np.ndarray, axis, bits: int) -> np.ndarray:
    keys = jax.random.split(jax.random.key(11), DRAWS)
    run = jax.jit(jax.vmap(lambda key: stochastic_round(g, key=key, bits=bits, axis=axis)))
    return np.asarray(run(keys))


@pytest.mark.parametrize("bits", range(1, 9))
def test_unbiased_with_the_variance_of_the_formula(bits, rng):
    g = rng.normal(size=(4, 8)).astype(np.float32) * np.float32([[1e-3], [1], [10], [1e4]])
    draws = draw_many(g, 0, bits)
    variance = reference.rounding_variance(g, bits, 0)
    span = np.ptp(g, axis=1, keepdims=True)
    resolution = span / (2**bits - 1) * 2.0**-16 + 4e-7 * np.abs(g).max(axis=1, keepdims=True)
    reference.assert_mean(draws, g, variance, floor=resolution)
    for row in range(4):  # each group apart: their scales differ by orders of magnitude
        reference.assert_total_variance(draws[:, row], variance[row].sum())
    levels = np.round((draws - g.min(1, keepdims=True)) / span * (2**bits - 1), 3)
    np.testing.assert_array_equal(levels, np.round(levels))


@pytest.mark.parametrize(("axis", "group_axis"), [(None, None), (1, 1), (-1, 1), ((0,), 0)])
def test_groups_follow_the_axis(axis, group_axis, rng):
    g = (rng.normal(size=(4, 6)) * [[1], [1], [1], [20]]).astype(np.float32)
    draws = draw_many(g, axis, 2)
    variance = reference.rounding_variance(g, 2, group_axis)
    reference.assert_mean(draws, g, variance, floor=np.ptp(g) * 2.0**-16)
    reference.assert_total_variance(draws, variance.sum())


def test_several_axes_tell_groups_apart(rng):
    g = rng.normal(size=(3, 5, 2)).astype(np.float32)
    rounded = np.asarray(stochastic_round(g, key=KEY, bits=1, axis=(0, -1)))
    for i in range(3):
        for j in range(2):
            ends = {g[i, :, j].min(), g[i, :, j].max()}
            assert all(min(abs(v - e) for e in ends) < 1e-6 for v in rounded[i, :, j])


def test_every_entry_its_own_group_is_exact(rng):
    g = rng.normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_array_equal(stochastic_round(g, key=KEY, bits=1, axis=(0, 1)), g)


def test_a_range_below_the_smallest_stays_unbiased():
    g = np.float32([[0, 2.0**-103, 3 * 2.0**-102]])
    draws = draw_many(g, 0, 1)
    step = 2.0**-100
    fraction = g.astype(np.float64) / step
    variance = step**2 * fraction * (1 - fraction)
    reference.assert_mean(draws / step, g / step, variance / step**2, floor=2.0**-16)


# Edges


@pytest.mark.parametrize("value", [0.0, -3.25, 1e30, 1e-35])
def test_a_constant_group_is_exact(value):
    g = jnp.full((2, 9), value, jnp.float32)
    np.testing.assert_array_equal(stochastic_round(g, key=KEY, bits=3), g)


def test_extremes_of_a_group_are_exact(rng):
    g = rng.integers(-50, 50, size=(6, 16)).astype(np.float32)
    rounded = np.asarray(stochastic_round(g, key=KEY, bits=1))
    for extreme in (g.min(1, keepdims=True), g.max(1, keepdims=True)):
        where = g == extreme
        np.testing.assert_array_equal(rounded[where], g[where])


def test_nan_poisons_its_group_and_no_other(rng):
    g = rng.normal(size=(3, 4)).astype(np.float32)
    clean = np.asarray(stochastic_round(g, key=KEY, bits=2))
    g[1, 2] = np.nan
    rounded = np.asarray(stochastic_round(g, key=KEY, bits=2))
    assert np.isnan(rounded[1]).all()
    np.testing.assert_array_equal(rounded[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_arrays(shape):
    assert stochastic_round(jnp.zeros(shape), key=KEY, bits=4).shape == shape


def test_a_scalar_is_one_group():
    assert stochastic_round(jnp.float32(2.5), key=KEY, bits=1, axis=None) == 2.5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_small_types_are_kept(dtype):
    g = jnp.array([[0.0, 0.3, 1.0]], dtype)
    rounded = stochastic_round(g, key=KEY, bits=1)
    assert rounded.dtype == dtype
    assert set(np.asarray(rounded, np.float32).ravel().tolist()) <= {0.0, 1.0}


def test_same_key_same_result_other_key_other_result(rng):
    g = rng.normal(size=(8, 32)).astype(np.float32)
    first, again = (stochastic_round(g, key=KEY, bits=4) for _ in range(2))
    other = stochastic_round(g, key=jax.random.key(8), bits=4)
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).mean() > 0.1


@pytest.mark.parametrize("axis", [2, -3, (0, 2)])
def test_axis_out_of_range(axis):
    with pytest.raises(ValueError, match="is outside the 2 axes"):
        stochastic_round(jnp.ones((2, 3)), key=KEY, bits=4, axis=axis)


@pytest.mark.parametrize(
    ("bits", "error"),
    [(0, ValueError), (9, ValueError), (2.0, TypeError), ("4", TypeError), (True, TypeError)],
)
def test_bad_bits(bits, error):
    with pytest.raises(error, match="bits must be an integer from 1 to 8"):
        stochastic_round(jnp.ones((2, 3)), key=KEY, bits=bits)


def test_integers_are_rejected():
    with pytest.raises(TypeError, match="floating-point"):
        stochastic_round(jnp.ones((2, 3), jnp.int32), key=KEY, bits=4)


# Transformations


def test_jit_and_vmap_change_nothing(rng):
    g = jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)
    keys = jax.random.split(KEY, 3)

    def one(x, key):
        return stochastic_round(x, key=key, bits=4)

    apart = jnp.stack([one(x, k) for x, k in zip(g, keys, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(g, keys), apart, atol=5e-7, rtol=0)


def test_gradient_is_that_of_the_identity(rng):
    g = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    weights = jnp.arange(12.0).reshape(3, 4)
    grad = jax.grad(lambda x: (weights * stochastic_round(x, key=KEY, bits=2)).sum())(g)
    np.testing.assert_array_equal(grad, weights)
