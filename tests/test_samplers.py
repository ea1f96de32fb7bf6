"""What every sampler promises, those with a name and one of a user's own."""

import dataclasses
import typing
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fqt_jax as fqt
from experiments.finetune import FinetuneConfig
from fqt_jax import SAMPLERS, GradientQuantizer, Sampler, Selection, diagnostics, theory
from fqt_jax.pruning import draw
from fqt_jax.rounding import counter_bits
from fqt_jax.samplers import Bernoulli, Systematic, as_sampler
from tests import reference

DRAWS = 20_000
SEEDS = jax.random.bits(jax.random.key(5), (DRAWS, 2))


@dataclasses.dataclass(frozen=True)
class Pairs(Sampler):
    """A user's: keeps a pair of neighbours, or its complement; of an even number of groups."""

    odds: float = 0.5

    def probabilities(self, importance, k):
        first = jnp.arange(importance.shape[0]) < k
        return jnp.where(first, jnp.float32(self.odds), jnp.float32(1 - self.odds))

    def draw(self, p, k, seed):
        n = p.shape[0]
        first = counter_bits(seed, jnp.uint32(0)) < jnp.uint32(self.odds * 2**32)
        indices = jnp.where(first, jnp.arange(k), jnp.arange(n - k, n)).astype(jnp.int32)
        return Selection(indices, 1 / p[indices], n)


@dataclasses.dataclass(frozen=True)
class Lucky(Bernoulli):
    """Random and not rescaled: biased, with a variance as well."""

    rescales: ClassVar[bool] = False

    def draw(self, p, k, seed):
        drawn = super().draw(p, k, seed)
        return dataclasses.replace(drawn, weights=jnp.sign(drawn.weights))


EVERY = [*SAMPLERS.values(), Pairs(0.25), Lucky()]
every_sampler = pytest.mark.parametrize("sampler", EVERY, ids=str)


def importance(n: int = 6) -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).lognormal(sigma=1.0, size=n), jnp.float32)


def drawn_weights(sampler, r, k) -> np.ndarray:
    one = jax.jit(jax.vmap(lambda seed: draw(r, k, sampler, seed).expand()))
    return np.asarray(one(SEEDS), np.float64)


@every_sampler
def test_draws_have_the_probabilities_weights_and_number_it_says(sampler):
    r, k = importance(), 3
    p = np.asarray(sampler.probabilities(r, k), np.float64)
    np.testing.assert_allclose(p.sum(), k, rtol=1e-5)
    weights = drawn_weights(sampler, r, k)
    kept = weights != 0
    reference.assert_mean(kept, p, p * (1 - p), floor=1e-6)
    np.testing.assert_allclose(
        weights[kept], np.broadcast_to(sampler.weights(p), kept.shape)[kept], rtol=1e-5
    )
    selection = draw(r, k, sampler, SEEDS[0])
    assert selection.indices.shape == (k if sampler.exact else 6,)
    assert np.ptp(kept.sum(axis=1)) == 0 or not sampler.exact
    mean = weights.mean(axis=0)
    assert sampler.unbiased == bool(np.allclose(mean, 1, atol=0.1))


@every_sampler
def test_outcomes_are_those_of_the_draw(sampler):
    p = np.asarray(sampler.probabilities(importance(), 3), np.float64)
    probability, weights = sampler.outcomes(p, draws=DRAWS)
    assert probability.sum() == pytest.approx(1)
    np.testing.assert_allclose(probability @ (weights > 0), p, atol=0.02)
    drawn = drawn_weights(sampler, importance(), 3)
    u = np.random.default_rng(0).normal(size=(6, 4))
    square = np.sum((drawn @ u) ** 2, axis=1).mean()
    np.testing.assert_allclose(probability @ np.sum((weights @ u) ** 2, axis=1), square, rtol=0.05)
    again = sampler.outcomes(p, draws=DRAWS)
    np.testing.assert_array_equal(weights, again[1])


@every_sampler
def test_variance_of_a_sum_is_that_of_the_draws(sampler):
    r, k = importance(), 3
    p = np.asarray(sampler.probabilities(r, k), np.float64)
    u = np.random.default_rng(1).normal(size=(6, 4)) + 1
    if not sampler.unbiased:
        with pytest.raises(ValueError, match="must be unbiased"):
            theory.sampled_sum_variance(u, p, sampler)
        return
    sums = drawn_weights(sampler, r, k) @ u
    expected = np.sum((sums - u.sum(axis=0)) ** 2, axis=1).mean()
    np.testing.assert_allclose(theory.sampled_sum_variance(u, p, sampler), expected, rtol=0.05)


@every_sampler
@pytest.mark.parametrize("prune", ["channels", "shared"])
def test_theory_and_measurement_agree(sampler, prune):
    rng = np.random.default_rng(3)
    g = rng.normal(size=(8, 2, 2, 6)) * rng.lognormal(size=(8, 1, 1, 1))
    g = jnp.asarray(g * rng.lognormal(size=6), jnp.float32)
    quantizer = GradientQuantizer(2, 0.5, sampler, prune=prune)
    how = diagnostics.Quantization(quantizer, "weight")
    measured = diagnostics.measured_error(g, how, jax.random.key(1), draws=6000)
    predicted = how.predicted(g, selections=2000)
    np.testing.assert_allclose(measured.mean, predicted.total, rtol=0.05)
    assert (predicted.bias == 0) == sampler.unbiased


def test_a_layer_takes_a_sampler_of_ones_own():
    quantizer = GradientQuantizer(4, 0.5, sampler=Pairs(0.25), prune="shared")
    recipe = fqt.Recipe(gradient=quantizer)
    assert "of 50% (pairs(odds=0.25), shared)" in str(recipe)
    assert recipe == fqt.Recipe(gradient=dataclasses.replace(quantizer, sampler=Pairs(0.25)))
    assert recipe != fqt.Recipe(gradient=dataclasses.replace(quantizer, sampler=Pairs()))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)) * 0.1, jnp.float32)
    w = jnp.ones((5, 3))

    @jax.jit
    def input_gradient(x, key):
        return jax.grad(lambda x: fqt.dense(x, w, key=key, recipe=recipe).sum())(x)

    kept = {
        tuple(np.flatnonzero(np.abs(input_gradient(x, jax.random.key(i))).sum(axis=1)))
        for i in range(20)
    }
    assert kept == {(0, 1, 2, 3), (4, 5, 6, 7)}


def test_a_name_and_its_sampler_are_the_same_choice():
    for name, sampler in SAMPLERS.items():
        assert str(sampler) == name
        named = GradientQuantizer(sampler=name)
        assert named.sampler is sampler
        assert named == GradientQuantizer(sampler=type(sampler)())
        assert hash(named) == hash(GradientQuantizer(sampler=type(sampler)()))


def test_the_options_of_a_run_are_the_registered_samplers():
    hint = typing.get_type_hints(FinetuneConfig)["sampler"]
    (names, _) = typing.get_args(hint)
    assert typing.get_args(names) == tuple(SAMPLERS)
    assert {name.split("/")[0] for name in diagnostics.COMPARED if "agp" in name} == {
        f"agp_{name}" for name in SAMPLERS
    }


class Mutable(Systematic):
    def __init__(self):
        self.floor = 0.1


@dataclasses.dataclass(frozen=True)
class Unhashable(Systematic):
    table: list = dataclasses.field(default_factory=list)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            "median",
            ValueError,
            "sampler must be one of 'systematic', .* or a Sampler; got 'median'",
        ),
        (None, ValueError, "or a Sampler; got None"),
        (Systematic, ValueError, "or a Sampler; got <class"),
        (["topk"], ValueError, "or a Sampler; got"),
        (Mutable(), TypeError, "Mutable must be a frozen dataclass, .*: floor would not count"),
        (Unhashable(), TypeError, r"unhashable\(table=\[\]\) cannot be hashed"),
    ],
)
def test_what_is_no_sampler_is_named(value, error, message):
    for take in (as_sampler, lambda v: GradientQuantizer(sampler=v)):
        with pytest.raises(error, match=message) as caught:
            take(value)
        assert "\n" not in str(caught.value)
