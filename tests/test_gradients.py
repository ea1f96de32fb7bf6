import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqt_jax as fqt
from fqt_jax.gradients import OneDraw, batch_gradients, drawn_gradients
from fqt_jax.models import VGG
from fqt_jax.training import cross_entropy
from tests.test_functional import normal

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


class Plain(nnx.Module):
    """Two quantizable layers between a first and a last, and no norm."""

    def __init__(self, rngs):
        self.first = nnx.Linear(6, 12, rngs=rngs)
        self.middle = nnx.Linear(12, 12, rngs=rngs)
        self.last = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.middle(self.first(x)))


def split(model, recipe, implementation=None):
    quantized = fqt.quantize(model, recipe, implementation=implementation).model
    return nnx.split(quantized, nnx.Param, ...)


def plain_task(recipe):
    x, y = 2 * normal(0, 16, 6), jnp.arange(16) % 3
    return (*split(Plain(nnx.Rngs(0)), recipe), x, y, cross_entropy)


def vgg_task(recipe, implementation=None):
    model = VGG(((4,), (8,)), num_classes=3, in_features=1, rngs=nnx.Rngs(0))
    return (
        *split(model, recipe, implementation),
        normal(0, 16, 8, 8, 1),
        jnp.arange(16) % 3,
        cross_entropy,
    )


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def statistics(task, others) -> np.ndarray:
    model = nnx.merge(task[0], task[1], others, copy=True)
    return flat(nnx.state(model, nnx.BatchStat))


@pytest.mark.parametrize("recipe", [fqt.QAT, fqt.FQT1])
def test_remat_changes_nothing_but_memory(recipe):
    graphdef, params, others, x, y, losses = vgg_task(recipe)
    results = [
        jax.jit(functools.partial(batch_gradients, graphdef, losses_of=losses, remat=remat))(
            params, others, x, y
        )
        for remat in (False, True)
    ]
    np.testing.assert_allclose(flat(results[0].grads), flat(results[1].grads), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(results[0].logits, results[1].logits, rtol=1e-5, atol=1e-5)


def test_drawing_all_rows_without_norms_is_the_whole_batch():
    task = plain_task(fqt.QAT)
    expected = batch_gradients(*task)
    got = drawn_gradients(*task, OneDraw(keep=1.0), jax.random.key(0))
    np.testing.assert_allclose(flat(got.grads), flat(expected.grads), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got.logits, expected.logits)


@pytest.mark.parametrize("recipe", [fqt.QAT, fqt.FQT1])
def test_without_norms_the_drawn_gradient_is_unbiased(recipe):
    # The model's own stream of rounding keys is part of its state: vary it with the draw.
    graphdef, params, others, x, y, losses = plain_task(recipe)
    expected = flat(batch_gradients(*plain_task(fqt.QAT)).grads)

    def one(key):
        draw_key, rounding_key = jax.random.split(key)
        model = nnx.merge(graphdef, params, others, copy=True)
        nnx.reseed(model, rounding=rounding_key)
        fresh = nnx.split(model, nnx.Param, ...)[2]
        result = drawn_gradients(graphdef, params, fresh, x, y, losses, OneDraw(), draw_key)
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(result.grads)])

    draws = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 4000)))
    error = draws.mean(0) - expected
    spread = draws.std(0) / np.sqrt(len(draws))
    assert np.abs(error).max() > 0
    assert (np.abs(error) <= 4.5 * spread + 1e-6).all()


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_drawing_all_rows_is_the_whole_batch_through_norms_too(implementation):
    task = vgg_task(fqt.QAT, implementation)
    whole = batch_gradients(*task)
    drawn = drawn_gradients(*task, OneDraw(keep=1.0), jax.random.key(0))
    np.testing.assert_allclose(drawn.logits, whole.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        statistics(task, drawn.others), statistics(task, whole.others), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(flat(drawn.grads), flat(whole.grads), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_what_flows_through_norms_is_drawn_too(implementation):
    task = vgg_task(fqt.QAT, implementation)
    graphdef, params, others, x, y, losses = task
    exact = flat(batch_gradients(*task).grads)

    def one(key):
        result = drawn_gradients(graphdef, params, others, x, y, losses, OneDraw(keep=0.5), key)
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(result.grads)])

    draws = jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(1), 400))
    bias = np.linalg.norm(np.asarray(draws, np.float64).mean(0) - exact) / np.linalg.norm(exact)
    # Of the order of one over the eight rows; without the flow through the statistics it is 0.6.
    assert bias < 0.25


def test_layers_prune_no_further_when_rows_were_drawn():
    assert fqt.FQT1.unpruned().gradient.keep_fraction == 1
    assert fqt.QAT.unpruned() is fqt.QAT
    assert OneDraw().kept(128) == 32


@pytest.mark.parametrize("options", [{"keep": 0.0}, {"keep": 1.5}, {"floor": -1.0}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        OneDraw(**options)
