"""Chains in fused form against the same modules called in turn."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqt_jax as fqt
from fqt_jax import chain
from fqt_jax.chain import Between, run_chain
from fqt_jax.kernels import native

LEARNED = dataclasses.replace(fqt.QAT, scale="learned")
UNSCALED = dataclasses.replace(fqt.QAT, scale="none", clip=False)

pytestmark = [
    pytest.mark.usefixtures("relaxed_promotion"),
    pytest.mark.skipif(
        native.unavailable() is not None, reason="chains are fused by the native kernels only"
    ),
]


class Net(nnx.Module):
    """A chain of three convolutions with every kind of place between them."""

    def __init__(self, recipes, *, norms=True):
        rngs = nnx.Rngs(params=0, rounding=1)

        def conv(inputs, outputs, recipe, strides=1):
            options = {"use_bias": False, "rngs": rngs}
            if recipe is None:
                return nnx.Conv(inputs, outputs, (3, 3), strides, **options)
            return fqt.QuantConv(inputs, outputs, 3, strides, recipe=recipe, **options)

        def norm(features):
            if not norms:
                return None
            norm = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
            # Without these, sums that equal their mean lie on the edge of a sign.
            norm.scale[...], norm.bias[...] = jax.random.uniform(rngs.params(), (2, features)) + 0.1
            return norm

        self.convs = nnx.List(
            [conv(8, 12, recipes[0]), conv(12, 16, recipes[1], 2), conv(16, 8, recipes[2])]
        )
        self.norms = nnx.List([norm(n) for n in (8, 12, 16, 8)] if norms else [])
        self.acts = nnx.List([nnx.PReLU(0.25) for _ in range(3)])

    def __call__(self, x):
        first, second, third, last = self.norms if len(self.norms) else [None] * 4
        betweens = (
            Between(first),
            Between(second, self.acts[0], pool=2),
            Between(third, self.acts[1], "act_norm"),
            Between(last, self.acts[2]),
        )
        return run_chain(x, betweens, self.convs)


def value_and_grads(net, x, *, train=True):
    """Output, gradients of the parameters and of ``x``, and the state after, of a random loss."""
    graphdef, params, others = nnx.split(net, nnx.Param, ...)

    def loss(params, x):
        model = nnx.merge(graphdef, params, others, copy=True)
        model.train() if train else model.eval()
        out = model(x)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out * weights), (out, nnx.split(model, nnx.Param, ...)[2])

    (_, (out, after)), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    return out, grads, jax.tree.map(_data, after)


def _data(a):
    return jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a


@contextlib.contextmanager
def in_turn(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(chain, "_can_fuse", lambda *_: False)
        yield


def images(n=6, size=9):
    return jax.random.normal(jax.random.key(5), (n, size, size, 8))


def assert_trees_close(got, expected, tolerance):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)
        assert error < tolerance, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize(
    ("recipe", "norms", "train", "tolerance"),
    [
        (fqt.QAT, True, True, 1e-4),  # the slope's gradient is a small difference of large sums
        (fqt.QAT, True, False, 1e-5),
        (UNSCALED, False, True, 1e-5),
        (LEARNED, True, False, 1e-5),
        (fqt.FQT1, True, True, 1e-3),
    ],
)
def test_the_two_forms_agree(monkeypatch, recipe, norms, train, tolerance):
    net = Net([recipe] * 3, norms=norms)
    fused = value_and_grads(net, images(), train=train)
    with in_turn(monkeypatch):
        expected = value_and_grads(net, images(), train=train)
    assert_trees_close(fused, expected, tolerance)


def test_the_fused_form_keeps_bits_and_sums_only(monkeypatch):
    """No float of an activation's size but the input waits for the backward pass."""
    x = images(16, 16)
    graphdef, params, others = nnx.split(Net([fqt.FQT1] * 3), nnx.Param, ...)

    def kept(params):
        def run(params):
            return nnx.merge(graphdef, params, others, copy=True)(x)

        leaves = jax.tree.leaves(jax.vjp(run, params)[1])
        return sorted(a.dtype.name for a in leaves if a.shape[:1] == (16,) and a.size > 16 * 100)

    # The input, and the sums of three convolutions. Bits are too small to be counted.
    assert kept(params) == ["float32", *["int16"] * 3]
    with in_turn(monkeypatch):
        assert kept(params).count("float32") > 6


def test_the_output_of_a_float_convolution_of_images_is_computed_again():
    x = images(16, 16)
    graphdef, params, others = nnx.split(
        Net([fqt.FULL_PRECISION, fqt.FQT1, fqt.QAT]), nnx.Param, ...
    )

    def run(params):
        return nnx.merge(graphdef, params, others, copy=True)(x)

    # The input of 8 channels is kept, and not the output of 12.
    leaves = jax.tree.leaves(jax.vjp(run, params)[1])
    floats = [a for a in leaves if a.shape[:3] == (16, 16, 16) and a.dtype == jnp.float32]
    assert all(a.shape[3] == 8 for a in floats)
    # XLA must not make the two computations one again.
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(run(params))))
    program = gradient.lower(params).compile().as_text()
    assert program.count('custom_call_target="fqt_jax_float_conv"') == 2


@pytest.mark.parametrize("place", [0, 1, 2])
def test_float_layers_part_the_chain(monkeypatch, place):
    recipes = [fqt.QAT] * 3
    recipes[place] = fqt.FULL_PRECISION
    net = Net(recipes)
    fused = value_and_grads(net, images())
    with in_turn(monkeypatch):
        expected = value_and_grads(net, images())
    assert_trees_close(fused, expected, 3e-4)


def test_plain_convolutions_are_called_in_turn(monkeypatch):
    monkeypatch.setattr(chain, "_run_fused", None)
    assert Net([None] * 3)(images()).shape == (6, 2, 2, 8)


@pytest.mark.parametrize("train", [True, False])
def test_nan_of_the_input_and_of_weights_is_seen(train):
    net = Net([fqt.QAT] * 3)
    x = images().at[2, 3, 3, 1].set(jnp.nan)
    out, *_ = value_and_grads(net, x, train=train)
    assert np.isnan(out[2]).all()
    assert train or not np.isnan(np.delete(np.asarray(out), 2, 0)).any()
    kernel = net.convs[1].kernel
    kernel[...] = kernel[...].at[0, 0, 0, 3].set(jnp.nan)
    out, *_ = value_and_grads(net, images(), train=train)
    assert np.isnan(out).all()


def test_statistics_of_the_batch_and_running_ones():
    net = Net([fqt.QAT] * 3)
    x = images()
    net.train()
    net(x)
    expected = 0.1 * np.asarray(x, np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(net.norms[0].mean[...], expected, rtol=1e-5, atol=1e-7)
    variance = 0.9 + 0.1 * np.asarray(x, np.float64).var((0, 1, 2))
    np.testing.assert_allclose(net.norms[0].var[...], variance, rtol=1e-5)
    before = [jnp.copy(norm.mean[...]) for norm in net.norms]
    net.eval()
    net(x)
    for norm, mean in zip(net.norms, before, strict=True):
        np.testing.assert_array_equal(norm.mean[...], mean)


def test_under_vmap():
    net = Net([fqt.QAT] * 3)
    net.eval()
    x = jnp.stack([images(3), images(3)[::-1]])
    graphdef, state = nnx.split(net)

    def run(x):
        return nnx.merge(graphdef, state, copy=True)(x)

    together = jax.jit(jax.vmap(run))(x)
    np.testing.assert_array_equal(together[0], jax.jit(run)(x[0]))
    np.testing.assert_array_equal(together[1], jax.jit(run)(x[1]))


def test_under_shard_map():
    net = Net([fqt.QAT] * 3)
    net.eval()
    x = images(8)
    graphdef, params, others = nnx.split(net, nnx.Param, ...)

    def grad(params, x):
        def loss(params):
            return jnp.sum(nnx.merge(graphdef, params, others, copy=True)(x) ** 2)

        return jax.grad(loss)(params)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    sharded = jax.jit(
        jax.shard_map(grad, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())
    )
    assert_trees_close(sharded(params, x), jax.jit(grad)(params, x), 1e-5)


def test_lengths_that_do_not_fit():
    message = "1 convolutions have 2 places around them; got 1 betweens."
    with pytest.raises(ValueError, match=re.escape(message)):
        run_chain(images(), [Between()], [Net([fqt.QAT] * 3).convs[0]])


class _Block(nnx.Module):
    """A residual block whose shortcut is the identity."""

    def __init__(self, recipes):
        rngs = nnx.Rngs(params=0, rounding=1)
        self.norms = nnx.List([nnx.BatchNorm(8, momentum=0.9, rngs=rngs) for _ in range(2)])
        self.convs = nnx.List(
            [fqt.QuantConv(8, 8, 3, use_bias=False, recipe=recipe, rngs=rngs) for recipe in recipes]
        )
        self.act = nnx.PReLU(0.25)

    def __call__(self, x):
        betweens = (Between(self.norms[0]), Between(self.norms[1]), Between(act=self.act))
        return run_chain(x, betweens, self.convs, residual=x)


@pytest.mark.parametrize("recipes", [[fqt.QAT] * 2, [fqt.QAT, fqt.FULL_PRECISION]])
def test_residual_is_added_as_in_turn(recipes, monkeypatch):
    x = images()
    fused = value_and_grads(_Block(recipes), x)
    with in_turn(monkeypatch):
        expected = value_and_grads(_Block(recipes), x)
    assert_trees_close(fused, expected, 1e-4)


def test_residual_may_have_another_dtype():
    block = _Block([fqt.QAT] * 2)
    x = images()
    betweens = [Between(), Between(), Between()]
    out = run_chain(x, betweens, block.convs, residual=x.astype(jnp.bfloat16))
    plain = run_chain(x, betweens, block.convs) + x.astype(jnp.bfloat16)
    np.testing.assert_allclose(out, plain, atol=1e-5)


@pytest.mark.parametrize("recipes", [[fqt.QAT] * 2, [fqt.QAT, fqt.FULL_PRECISION]])
def test_residual_of_another_shape(recipes, monkeypatch):
    block, x = _Block(recipes), images()
    betweens = [Between(), Between(), Between()]
    message = "residual must have the shape of the output, (6, 9, 9, 8); got (6, 9, 9, 1)."
    with pytest.raises(ValueError, match=re.escape(message)):
        run_chain(x, betweens, block.convs, residual=x[..., :1])
    with in_turn(monkeypatch), pytest.raises(ValueError, match=re.escape(message)):
        run_chain(x, betweens, block.convs, residual=x[..., :1])
