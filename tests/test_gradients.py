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


def split(model, recipe):
    return nnx.split(fqt.quantize(model, recipe).model, nnx.Param, ...)


def plain_task(recipe):
    x, y = 2 * normal(0, 16, 6), jnp.arange(16) % 3
    return (*split(Plain(nnx.Rngs(0)), recipe), x, y, cross_entropy)


def vgg_task(recipe):
    model = VGG(((4,), (8,)), num_classes=3, in_features=1, rngs=nnx.Rngs(0))
    return (*split(model, recipe), normal(0, 16, 8, 8, 1), jnp.arange(16) % 3, cross_entropy)


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


def test_batch_norms_statistics_are_constants_and_move_as_they_would():
    task = vgg_task(fqt.QAT)
    graphdef, params, others, x, y, losses = task
    whole = batch_gradients(*task)
    drawn = drawn_gradients(*task, OneDraw(keep=1.0), jax.random.key(0))
    np.testing.assert_allclose(drawn.logits, whole.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        statistics(task, drawn.others), statistics(task, whole.others), rtol=1e-4, atol=1e-6
    )

    def with_constants(params):
        model = nnx.merge(graphdef, params, others, copy=True)
        norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)]
        for norm in norms:
            norm.momentum = 0.0
        model.train()
        model(x)
        for norm in norms:
            norm.mean[...], norm.var[...] = map(
                jax.lax.stop_gradient, (norm.mean[...], norm.var[...])
            )
        model.eval()
        return losses(model(x), y).mean()

    expected = jax.grad(with_constants)(params)
    np.testing.assert_allclose(flat(drawn.grads), flat(expected), rtol=1e-3, atol=1e-5)
    # That is a bias: the whole gradient also flows through the statistics.
    difference = np.linalg.norm(flat(drawn.grads) - flat(whole.grads))
    assert difference > 0.01 * np.linalg.norm(flat(whole.grads))


def test_layers_prune_no_further_when_rows_were_drawn():
    assert fqt.FQT1.unpruned().gradient.keep_fraction == 1
    assert fqt.QAT.unpruned() is fqt.QAT
    assert OneDraw().kept(128) == 32


@pytest.mark.parametrize("options", [{"keep": 0.0}, {"keep": 1.5}, {"floor": -1.0}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        OneDraw(**options)
