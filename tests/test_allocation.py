import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import fqt_jax as fqt
from fqt_jax import GradientQuantizer, Recipe
from fqt_jax.allocation import InUse, layers_in_use, share
from fqt_jax.models import LSTM, VGG

layers = st.lists(
    st.tuples(st.integers(1, 10**6), st.integers(1, 8), st.floats(0.01, 0.99)),
    min_size=1,
    max_size=12,
)


def recipe(bits: int, keep: float) -> Recipe:
    return Recipe(gradient=GradientQuantizer(bits=bits, keep=keep))


def bits_of(recipes, in_use):
    return sum(r.gradient.bits_per_entry * in_use[path].entries for path, r in recipes.items())


@given(layers)
def test_what_is_kept_takes_as_many_bits_and_makes_the_least_error(given_layers):
    in_use = {str(i): InUse(i + 1, entries) for i, (entries, _, _) in enumerate(given_layers)}
    recipes = {str(i): recipe(bits, keep) for i, (_, bits, keep) in enumerate(given_layers)}
    shared = share(recipes, in_use)
    assert shared.keys() == recipes.keys()
    np.testing.assert_allclose(bits_of(shared, in_use), bits_of(recipes, in_use), rtol=1e-9)
    keeps = np.array([r.gradient.keep_fraction for r in shared.values()])
    assert (keeps <= 1).all()
    # What one more bit takes off the error is the same in all layers that do not keep everything,
    # and less in those that do: the conditions of Karush, Kuhn and Tucker.
    gains = [
        in_use[path].place / (r.gradient.bits * in_use[path].entries * r.gradient.keep_fraction**2)
        for path, r in shared.items()
    ]
    inner = [gain for gain, keep in zip(gains, keeps, strict=True) if keep < 1]
    whole = [gain for gain, keep in zip(gains, keeps, strict=True) if keep == 1]
    if inner:
        np.testing.assert_allclose(inner, inner[0], rtol=1e-6)
        assert all(gain >= inner[0] * (1 - 1e-9) for gain in whole)


def test_the_rest_of_a_recipe_and_layers_that_keep_all_stay():
    in_use = {"a": InUse(1, 100), "b": InUse(2, 10), "whole": InUse(3, 5), "empty": InUse(4, 0)}
    plus = dataclasses.replace(fqt.FQT1_PLUS, scale="none")
    recipes = {
        "a": plus,
        "b": plus,
        "whole": recipe(4, 1.0),
        "float": fqt.QAT,
        "empty": fqt.FQT1,
        "unused": fqt.FQT1,
    }
    shared = share(recipes, in_use)
    assert shared.keys() == {"a", "b"}
    for changed in shared.values():
        keep = changed.gradient.keep_fraction
        assert changed == dataclasses.replace(
            plus, gradient=dataclasses.replace(plus.gradient, keep=keep)
        )
    assert share({"a": fqt.QAT}, in_use) == {}


class Reused(nnx.Module):
    """Calls a layer twice, and one never."""

    def __init__(self, rngs: nnx.Rngs):
        self.unused = nnx.Linear(8, 8, rngs=rngs)
        self.twice = nnx.Linear(8, 8, rngs=rngs)
        self.first = nnx.Linear(4, 8, rngs=rngs)

    def __call__(self, x):
        return self.twice(self.twice(self.first(x)))


def test_layers_are_counted_in_the_order_and_as_often_as_they_are_called():
    found = layers_in_use(Reused(nnx.Rngs(0)), jnp.zeros((3, 4)))
    assert found == {"first": InUse(1, 24), "twice": InUse(2, 48)}


def vgg() -> VGG:
    return VGG(((8,), (8, 8), (16,)), num_classes=3, in_features=3, rngs=nnx.Rngs(0))


def test_a_model_spends_the_bits_of_its_recipe_on_other_layers():
    image = jnp.zeros((64, 16, 16, 3))
    _, table = fqt.quantize(vgg(), fqt.FQT1_PLUS, example=image, budget="model")
    kept = [layer.recipe.gradient.keep_fraction for layer in table if layer.recipe.gradient]
    assert kept == sorted(kept)
    assert kept[0] < 0.25 < kept[-1]
    recipes = {layer.path: layer.recipe for layer in table if layer.recipe.gradient}
    in_use = layers_in_use(vgg(), image)
    entries = sum(in_use[path].entries for path in recipes)
    assert bits_of(recipes, in_use) / entries == pytest.approx(1.0)


def test_what_a_rule_decides_stays():
    image = jnp.zeros((1, 16, 16, 3))
    _, names = fqt.quantize(vgg(), fqt.FQT1, example=image)
    path = names[1].path
    _, table = fqt.quantize(vgg(), fqt.FQT1_PLUS, [(path, fqt.FQT1)], example=image, budget="model")
    recipes = {layer.path: layer.recipe for layer in table}
    assert recipes[path] == fqt.FQT1
    assert recipes[names[2].path].gradient.keep != recipes[names[3].path].gradient.keep


def test_a_budget_without_effect_or_meaning_is_an_error():
    image = jnp.zeros((1, 16, 16, 3))
    with pytest.raises(ValueError, match="budget must be 'layer' or 'model'; got 'net'"):
        fqt.quantize(vgg(), fqt.FQT1, budget="net")
    with pytest.raises(ValueError, match="needs an example"):
        fqt.quantize(vgg(), fqt.FQT1, budget="model")
    with pytest.raises(ValueError, match="no effect: the recipe prunes nothing"):
        fqt.quantize(vgg(), fqt.QAT, example=image, budget="model")
    rows = LSTM(1, 8, num_classes=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"cannot count the entries of layer .* inside of a loop"):
        fqt.quantize(rows, fqt.FQT1, example=jnp.zeros((1, 32, 32, 3)), budget="model")
