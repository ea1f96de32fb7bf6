import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqt_jax import FQT1, FQT1_PLUS, GradientQuantizer, theory
from fqt_jax.grids import GRIDS, zero_grid
from fqt_jax.grouping import roundings
from fqt_jax.kernels.scaling import code_step, gradient_codes
from fqt_jax.rounding import seeds_from_key
from tests import reference

ZERO = GradientQuantizer(bits=4, keep=1.0, grid="zero")

sides = st.sampled_from([0.0, 1e-20, 0.01, 1.0, 7.0, 1e20])


@given(sides, sides, st.booleans(), st.integers(2, 8))
def test_the_grid_is_the_finest_with_a_level_at_zero(below, above, one_sided, bits):
    lo, hi = (above / 2, above) if one_sided else (-below, above)
    lowest, value_range = zero_grid(np.float64(lo), np.float64(hi), bits)
    np.testing.assert_allclose((lowest, value_range), reference.zero_grid(lo, hi, bits), rtol=1e-12)
    assert lowest <= min(lo, 0)
    assert lowest + value_range >= hi * (1 - 1e-12)
    steps = 2**bits - 1
    assert value_range / steps <= (max(-lo, 0) + hi) / (steps - 1) * (1 + 1e-12)
    of_jax = jax.jit(zero_grid, static_argnums=2)(jnp.float32(lo), jnp.float32(hi), bits)
    np.testing.assert_allclose(of_jax, (lowest, value_range), rtol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_no_number_goes_on(grid):
    nan = jnp.float32([jnp.nan])
    assert np.isnan(GRIDS[grid](nan, nan, 4)).all()


def gradient(near: float = 0.04) -> np.ndarray:
    """Most entries near zero and a few far from it, as behind a max-pool."""
    rng = np.random.default_rng(0)
    shape = (6, 3, 3, 8)
    small = near * rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)
    g = np.where(rng.random(shape) < 0.2, rng.normal(size=shape), small)
    g[0], g[1], g[1:, 1, 1] = 2.5, np.abs(g[1]), 0.0
    return g.astype(np.float32)


def quantized(g: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradient as either product sees it."""
    of_input, of_weight = roundings(g, ZERO, seeds_from_key(key, 4))
    found = []
    for rounding, shape in ((of_input, (-1, 1, 1, 1)), (of_weight, (1, 1, 1, -1))):
        lo, step = (a.reshape(shape) for a in (rounding.lo, code_step(rounding)))
        found.append(lo + gradient_codes(g, rounding).astype(jnp.float32) * step)
    return found[0], found[1]


def test_rounding_is_unbiased_and_its_variance_that_of_theory():
    g = gradient()
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jax.jit(jax.vmap(lambda key: quantized(jnp.asarray(g), key)))(keys)
    for of_product, axis, product in zip(draws, (0, 3), ("input", "weight"), strict=True):
        variance = reference.rounding_variance(g, 4, axis, "zero")
        np.testing.assert_allclose(
            theory.rounding_variance(g, 4, axis, grid="zero"), variance, atol=1e-6
        )
        step = np.sqrt(variance.max())
        reference.assert_mean(of_product, g, variance, floor=1e-4 * step, errors=4.5)
        reference.assert_total_variance(np.asarray(of_product), variance.sum(), rtol=0.03)
        error = theory.gradient_error(g, ZERO, product=product)
        np.testing.assert_allclose(error.total, variance.sum(), rtol=1e-4)


def test_small_entries_make_little_noise():
    g = gradient(near=0.002)
    for axis in (0, 3):
        zero, plain = (
            theory.rounding_variance(g, 4, axis, grid=grid).sum() for grid in ("zero", "range")
        )
        assert zero < 0.5 * plain


def test_zeros_and_constant_samples_are_exact():
    g = gradient()
    of_input, of_weight = quantized(jnp.asarray(g), jax.random.key(1))
    for of_product in (of_input, of_weight):
        np.testing.assert_allclose(np.asarray(of_product)[1:, 1, 1], 0, atol=1e-6)
    np.testing.assert_allclose(of_input[0], g[0], rtol=1e-6)


@pytest.mark.parametrize("prune", ["channels", "shared"])
def test_the_bound_holds_where_groups_are_pruned(prune):
    quantizer = GradientQuantizer(bits=3, prune=prune, grid="zero")
    g = gradient()[1:]
    assert theory.gradient_error(g, quantizer).total <= theory.agp_bound(g, quantizer)


def test_one_bit_has_no_level_at_zero():
    with pytest.raises(ValueError, match="grid='zero' needs at least 2 bits"):
        GradientQuantizer(bits=1, grid="zero")


def test_a_recipe_says_so():
    assert FQT1.gradient.grid == "range"
    quantizer = dataclasses.replace(FQT1_PLUS.gradient, grid="zero")
    assert str(quantizer) == "4-bit gradients of 25% (systematic, shared) with a level at zero"
