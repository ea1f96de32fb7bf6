"""Estimators of the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqt_jax as fqt
from fqt_jax.estimators import FullBatch, OneDraw, SplitModel
from fqt_jax.estimators.one_draw import _error_norms
from fqt_jax.losses import CrossEntropy
from fqt_jax.models import VGG
from tests.test_functional import normal

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

LOSS = CrossEntropy(3)
KEY = jax.random.key(0)


class Plain(nnx.Module):
    """Two quantizable layers between a first and a last, and no norm."""

    def __init__(self, rngs):
        self.first = nnx.Linear(6, 12, rngs=rngs)
        self.middle = nnx.Linear(12, 12, rngs=rngs)
        self.last = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.middle(self.first(x)))


def plain_task(recipe):
    batch = {"x": 2 * normal(0, 16, 6), "label": jnp.arange(16) % 3}
    return SplitModel.of(fqt.quantize(Plain(nnx.Rngs(0)), recipe).model), batch, LOSS


def vgg_task(recipe, implementation=None):
    model = VGG(((4,), (8,)), num_classes=3, in_features=1, rngs=nnx.Rngs(0))
    quantized = fqt.quantize(model, recipe, implementation=implementation).model
    batch = {"x": normal(0, 16, 8, 8, 1), "label": jnp.arange(16) % 3}
    return SplitModel.of(quantized), batch, LOSS


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def statistics(model, others) -> np.ndarray:
    return flat(nnx.state(model.merge(others), nnx.BatchStat))


def assert_same(got, expected, rtol=1e-3, atol=1e-5):
    np.testing.assert_allclose(flat(got.outputs), flat(expected.outputs), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(flat(got.grads), flat(expected.grads), rtol=rtol, atol=atol)


def test_the_gradient_of_the_whole_batch_is_that_of_the_mean_loss(rng):
    x, w = rng.standard_normal((8, 4)), rng.standard_normal((4, 2))
    model = nnx.Linear(4, 2, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.float32(w)
    batch = (jnp.float32(x),)

    def loss(outputs, batch):
        return jnp.sum(jnp.square(outputs), axis=1)

    found = FullBatch().gradients(SplitModel.of(model), batch, loss, KEY)
    np.testing.assert_allclose(found.grads["kernel"][...], 2 * x.T @ (x @ w) / 8, rtol=1e-5)
    np.testing.assert_allclose(found.outputs, x @ w, rtol=1e-5)


@pytest.mark.slow
def test_drawing_all_rows_without_norms_is_the_whole_batch():
    task = plain_task(fqt.QAT)
    expected = FullBatch().gradients(*task, KEY)
    got = OneDraw(keep=1.0).gradients(*task, KEY)
    assert_same(got, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got.outputs, expected.outputs)


@pytest.mark.parametrize("recipe", [fqt.QAT, fqt.FQT1])
def test_without_norms_the_drawn_gradient_is_unbiased(recipe):
    # The model's own stream of rounding keys is part of its state: vary it with the draw.
    model, batch, loss = plain_task(recipe)
    expected = flat(FullBatch().gradients(*plain_task(fqt.QAT), KEY).grads)

    def one(key):
        draw_key, rounding_key = jax.random.split(key)
        merged = model.merge()
        nnx.reseed(merged, rounding=rounding_key)
        result = OneDraw().gradients(SplitModel.of(merged), batch, loss, draw_key)
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(result.grads)])

    draws = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 4000)))
    error = draws.mean(0) - expected
    spread = draws.std(0) / np.sqrt(len(draws))
    assert np.abs(error).max() > 0
    assert (np.abs(error) <= 4.5 * spread + 1e-6).all()


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_drawing_all_rows_is_the_whole_batch_through_norms_too(implementation):
    task = vgg_task(fqt.QAT, implementation)
    whole = FullBatch().gradients(*task, KEY)
    drawn = OneDraw(keep=1.0).gradients(*task, KEY)
    assert_same(drawn, whole)
    np.testing.assert_allclose(
        statistics(task[0], drawn.others), statistics(task[0], whole.others), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_what_flows_through_norms_is_drawn_too(implementation):
    task = vgg_task(fqt.QAT, implementation)
    exact = flat(FullBatch().gradients(*task, KEY).grads)

    def one(key):
        result = OneDraw(keep=0.5).gradients(*task, key)
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(result.grads)])

    draws = jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(1), 400))
    bias = np.linalg.norm(np.asarray(draws, np.float64).mean(0) - exact) / np.linalg.norm(exact)
    # Of the order of one over the eight rows; without the flow through the statistics it is 0.6.
    assert bias < 0.25


def test_layers_prune_no_further_when_rows_were_drawn():
    assert fqt.FQT1.unpruned().gradient.keep_fraction == 1
    assert fqt.QAT.unpruned() is fqt.QAT
    assert [OneDraw(keep).kept(n) for keep, n in ((0.25, 128), (0.01, 3), (1.0, 5))] == [32, 1, 5]


class TwoHeads(nnx.Module):
    """Outputs of several shapes and types."""

    def __init__(self):
        self.tokens = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        self.value = nnx.Linear(4, 1, rngs=nnx.Rngs(1))

    def __call__(self, x, scale):
        tokens = self.tokens(x) * scale[:, None, None]
        return {"tokens": tokens, "best": jnp.argmax(tokens, -1), "value": self.value(x[:, 0])}


def two_losses(outputs, batch):
    token = jnp.sum(outputs["tokens"] * batch["weights"], axis=(1, 2))
    return token + 0.5 * jnp.square(outputs["value"][:, 0] - outputs["best"][:, 0])


@pytest.mark.slow
def test_any_batch_and_any_outputs_are_drawn_from():
    batch = {
        "x": normal(0, 12, 5, 4),
        "scale": jnp.arange(12) + 1,
        "weights": normal(1, 12, 5, 3),
    }
    model = SplitModel.of(TwoHeads(), lambda batch: (batch["x"], batch["scale"]))
    task = (model, batch, two_losses)
    whole = FullBatch().gradients(*task, KEY)
    assert_same(OneDraw(keep=1.0).gradients(*task, KEY), whole)
    assert set(OneDraw().gradients(*task, KEY).outputs) == {"tokens", "best", "value"}

    # The importance: the norm of the gradient with respect to all outputs of a sample.
    outputs, _ = model.run(model.params, model.others, batch)
    off = np.float64(outputs["value"][:, 0] - outputs["best"][:, 0])
    squares = np.square(np.float64(batch["weights"])).sum((1, 2)) + off**2
    got = _error_norms(two_losses, outputs, batch, 12)
    np.testing.assert_allclose(got, np.sqrt(squares), rtol=1e-5)

    drawn = jax.jit(
        jax.vmap(lambda key: OneDraw().gradients(*task, key).grads["value"]["kernel"][...])
    )(jax.random.split(KEY, 4000))
    expected = np.asarray(whole.grads["value"]["kernel"][...])
    spread = np.std(drawn, 0) / np.sqrt(4000)
    assert (np.abs(np.mean(drawn, 0) - expected) < 4.5 * spread + 1e-6).all()


def test_outputs_without_an_entry_for_each_sample_are_refused():
    class Model(nnx.Module):
        def __call__(self, x):
            return x, jnp.mean(x)

    with pytest.raises(ValueError, match=r"one entry for each of the 4 samples; one has .* \(\)"):
        OneDraw().gradients(SplitModel.of(Model()), jnp.ones((4, 1)), lambda o, b: o[0][:, 0], KEY)


class Normed(nnx.Module):
    """A linear model of each row's features, with a norm."""

    def __init__(self, norm, axis=-1):
        self.linear = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.norm = norm
        self.last = nnx.Linear(6, 3, rngs=nnx.Rngs(1))
        self.axis = axis

    def __call__(self, x):
        x = jnp.moveaxis(self.linear(x), -1, self.axis)
        x = jnp.moveaxis(self.norm(x), self.axis, -1)
        return self.last(jnp.tanh(x)).mean(axis=1)


def normed_task(norm, axis=-1):
    batch = {"x": normal(0, 16, 5, 6), "label": jnp.arange(16) % 3}
    return SplitModel.of(Normed(norm, axis)), batch, LOSS


class Slow(nnx.BatchNorm):
    """A norm that is only built otherwise."""

    def __init__(self, features, rngs):
        super().__init__(features, momentum=0.5, epsilon=1e-2, rngs=rngs)


class Doubled(nnx.BatchNorm):
    """A norm that computes otherwise."""

    def __call__(self, x, *args, **kwargs):
        return 2 * super().__call__(x, *args, **kwargs)


@pytest.mark.parametrize(
    ("norm", "axis"),
    [
        pytest.param(Slow(6, rngs=nnx.Rngs(0)), -1, marks=pytest.mark.slow),
        (nnx.BatchNorm(6, axis=1, rngs=nnx.Rngs(0)), 1),
        (nnx.BatchNorm(6, use_bias=False, use_scale=False, rngs=nnx.Rngs(0)), -1),
        (nnx.LayerNorm(6, rngs=nnx.Rngs(0)), -1),
    ],
)
def test_norms_that_are_batch_norm_at_heart_serve(norm, axis):
    task = normed_task(norm, axis)
    whole, drawn = FullBatch().gradients(*task, KEY), OneDraw(1.0).gradients(*task, KEY)
    assert_same(drawn, whole)
    if isinstance(norm, nnx.BatchNorm):
        got, expected = (statistics(task[0], result.others) for result in (drawn, whole))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
        assert not np.array_equal(expected, statistics(task[0], None))
    # A plain one gets the same gradients from the same draw.
    if isinstance(norm, Slow):
        same = nnx.BatchNorm(6, momentum=0.5, epsilon=1e-2, rngs=nnx.Rngs(0))
        got, expected = (
            OneDraw().gradients(*normed_task(each), KEY).grads for each in (norm, same)
        )
        np.testing.assert_array_equal(flat(got), flat(expected))


class Masked(nnx.Module):
    """Calls its norm with a mask."""

    def __init__(self):
        self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x, mask=jnp.ones((x.shape[0], 1, 1), bool))


def stacked():
    norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
    norm.mean, norm.var = (nnx.BatchStat(jnp.ones((2, 6))) for _ in range(2))
    return norm


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (Doubled(6, rngs=nnx.Rngs(0)), "norm norm: Doubled is a subclass .* its own __call__"),
        (
            nnx.BatchNorm(6, axis_name="d", axis_index_groups=[[0], [1]], rngs=nnx.Rngs(0)),
            "statistics are of groups of devices",
        ),
        (nnx.BatchNorm(6, axis=(-1,), rngs=nnx.Rngs(0)), "several feature axes"),
        (stacked(), r"shape \(2, 6\), as those of stacked layers.* Use FullBatch\(\)"),
        (nnx.BatchNorm(16, axis=0, rngs=nnx.Rngs(0)), "features, along axis 0"),
        (Masked(), "with a mask"),
    ],
)
def test_norms_that_one_draw_would_get_wrong_are_refused(norm, message):
    with pytest.raises(ValueError, match=message):
        OneDraw().gradients(*normed_task(norm), KEY)


def test_a_norm_that_is_called_with_its_running_statistics_keeps_to_them():
    class Model(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
            self.norm.mean[...] = jnp.arange(6.0)

        def __call__(self, x):
            return self.norm(self.linear(x), use_running_average=True)[:, 0, :3]

    task = (SplitModel.of(Model()), normed_task(None)[1], LOSS)
    whole, drawn = FullBatch().gradients(*task, KEY), OneDraw(1.0).gradients(*task, KEY)
    assert_same(drawn, whole)
    np.testing.assert_allclose(
        statistics(task[0], drawn.others), statistics(task[0], None), rtol=1e-6
    )


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="this Flax has no tree mode")
@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.slow
def test_modules_as_trees_give_the_same_numbers(implementation):
    results = []
    for graph in (True, False):
        with nnx.set_graph_mode(graph):
            task = vgg_task(fqt.FQT1, implementation)
            for estimator in (FullBatch(), OneDraw()):
                result = jax.jit(lambda key, e=estimator, t=task: e.gradients(*t, key)[:2])(KEY)
                results.append(flat(result))
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_array_equal(results[1], results[3])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"keep": 0.0}, ValueError),
        ({"keep": 1.5}, ValueError),
        ({"keep": float("nan")}, ValueError),
        ({"keep": "0.5"}, TypeError),
        ({"keep": True}, TypeError),
        ({"floor": -1.0}, ValueError),
        ({"floor": float("inf")}, ValueError),
    ],
)
def test_bad_options_are_named(options, error):
    with pytest.raises(error, match=next(iter(options))):
        OneDraw(**options)
