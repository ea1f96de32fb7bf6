import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import fqt_jax as fqt
from fqt_jax import GradientQuantizer, Recipe
from fqt_jax.allocation import count_entries, share
from fqt_jax.models import LSTM, VGG
from fqt_jax.tapping import layer_calls

layers = st.lists(
    st.tuples(st.integers(1, 10**6), st.integers(1, 8), st.floats(0.01, 0.99)),
    min_size=1,
    max_size=12,
)


def recipe(bits: int, keep: float) -> Recipe:
    return Recipe(gradient=GradientQuantizer(bits=bits, keep=keep))


def bits_of(recipes, entries):
    return sum(r.gradient.bits_per_entry * entries[path] for path, r in recipes.items())


@given(layers)
def test_all_layers_spend_the_same_and_together_as_many_bits_as_before(given_layers):
    entries = {str(i): size for i, (size, _, _) in enumerate(given_layers)}
    recipes = {str(i): recipe(bits, keep) for i, (_, bits, keep) in enumerate(given_layers)}
    shared = share(recipes, entries)
    assert shared.keys() == recipes.keys()
    np.testing.assert_allclose(bits_of(shared, entries), bits_of(recipes, entries), rtol=1e-9)
    spent = {path: bits_of({path: r}, entries) for path, r in shared.items()}
    whole = {path for path, r in shared.items() if r.gradient.keep_fraction == 1}
    inner = [bits for path, bits in spent.items() if path not in whole]
    if inner:
        np.testing.assert_allclose(inner, inner[0], rtol=1e-9)
        assert all(spent[path] <= inner[0] * (1 + 1e-9) for path in whole)
    # No other fractions that spend as much make the product of 1 / k smaller.
    least = sum(-np.log(r.gradient.keep_fraction) for r in shared.values())
    assert least <= sum(-np.log(r.gradient.keep_fraction) for r in recipes.values()) + 1e-9


def test_the_rest_of_a_recipe_and_layers_that_keep_all_stay():
    entries = {"a": 100, "b": 10, "whole": 5, "empty": 0}
    plus = dataclasses.replace(fqt.FQT1_PLUS, scale="none")
    recipes = {
        "a": plus,
        "b": plus,
        "whole": recipe(4, 1.0),
        "float": fqt.QAT,
        "empty": fqt.FQT1,
        "unused": fqt.FQT1,
    }
    shared = share(recipes, entries)
    assert shared.keys() == {"a", "b"}
    for changed in shared.values():
        keep = changed.gradient.keep_fraction
        assert changed == dataclasses.replace(
            plus, gradient=dataclasses.replace(plus.gradient, keep=keep)
        )
    assert share({"a": fqt.QAT}, entries) == {}


class Reused(nnx.Module):
    """Calls a layer twice, and one never."""

    def __init__(self, rngs: nnx.Rngs):
        self.unused = nnx.Linear(8, 8, rngs=rngs)
        self.twice = nnx.Linear(8, 8, rngs=rngs)
        self.first = nnx.Linear(4, 8, rngs=rngs)

    def __call__(self, x):
        return self.twice(self.twice(self.first(x)))


def test_layers_are_counted_as_often_as_they_are_called():
    assert count_entries(layer_calls(Reused(nnx.Rngs(0)), jnp.zeros((3, 4)))[0]) == {
        "first": 24,
        "twice": 48,
    }


def vgg() -> VGG:
    return VGG(((8,), (8, 8), (16,)), num_classes=3, in_features=3, rngs=nnx.Rngs(0))


def test_a_model_spends_the_bits_of_its_recipe_on_other_layers():
    image = jnp.zeros((64, 16, 16, 3))
    _, table = fqt.quantize(vgg(), fqt.FQT1_PLUS, example=image, budget="model")
    kept = [layer.recipe.gradient.keep_fraction for layer in table if layer.recipe.gradient]
    assert kept == sorted(kept)
    assert kept[0] < 0.25 < kept[-1]
    recipes = {layer.path: layer.recipe for layer in table if layer.recipe.gradient}
    entries = count_entries(layer_calls(vgg(), image)[0])
    total = sum(entries[path] for path in recipes)
    assert bits_of(recipes, entries) / total == pytest.approx(1.0)


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
    with pytest.raises(ValueError, match="no effect: no layer in use gets the recipe by default"):
        fqt.quantize(vgg(), fqt.FQT1, [(".*", fqt.FQT1)], example=image, budget="model")
    rows = LSTM(1, 8, num_classes=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"cannot count the entries of layer .* inside of a loop"):
        fqt.quantize(rows, fqt.FQT1, example=jnp.zeros((1, 32, 32, 3)), budget="model")
