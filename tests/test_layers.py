import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqt_jax as fqt


def test_parameters_have_the_names_and_shapes_of_the_float_layers():
    rngs = nnx.Rngs(0)
    pairs = [
        (nnx.Conv(3, 5, (3, 2), rngs=rngs), fqt.QuantConv(3, 5, (3, 2), rngs=rngs)),
        (nnx.Linear(3, 5, rngs=rngs), fqt.QuantLinear(3, 5, rngs=rngs)),
    ]
    for ours, theirs in ((b, a) for a, b in pairs):
        shapes = [
            jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(m, nnx.Param)))
            for m in (ours, theirs)
        ]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID", 1, ((1, 0), (2, 1))])
def test_a_full_precision_layer_equals_flax(strides, padding):
    theirs = nnx.Conv(4, 6, (3, 3), strides, padding=padding, rngs=nnx.Rngs(0))
    ours = fqt.QuantConv(
        4, 6, 3, strides, padding=padding, recipe=fqt.FULL_PRECISION, rngs=nnx.Rngs(1)
    )
    nnx.update(ours, nnx.state(theirs))
    x = jax.random.normal(jax.random.key(0), (2, 7, 9, 4))
    with jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_each_call_rounds_anew_and_the_state_carries_the_stream():
    layer = fqt.QuantLinear(8, 16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (32, 8))
    dy = jax.random.normal(jax.random.key(1), (32, 16))
    graphdef, state = nnx.split(layer)

    @jax.jit
    def step(state):
        layer = nnx.merge(graphdef, state, copy=True)
        _, vjp = jax.vjp(lambda x: nnx.merge(graphdef, state, copy=True)(x), x)
        layer(x)
        return vjp(dy)[0], nnx.state(layer)

    first, after_one = step(state)
    again, _ = step(state)
    second, _ = step(after_one)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)


def test_the_stream_is_reseeded_by_its_name():
    layer = fqt.QuantLinear(2, 2, rngs=nnx.Rngs(0))
    before = layer.rounding()
    nnx.reseed(layer, rounding=7)
    assert layer.rounding() != before


def test_leading_axes_are_the_batch():
    layer = fqt.QuantConv(4, 4, 3, recipe=fqt.QAT, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 5, 4))
    expected = jnp.stack([layer(x[0]), layer(x[1])])
    np.testing.assert_array_equal(layer(x), expected)
    np.testing.assert_array_equal(layer(x[0, 0]), expected[0, 0])


def test_the_learned_scale_is_a_parameter_that_starts_at_the_mean_of_the_weights():
    recipe = dataclasses.replace(fqt.QAT, scale="learned")
    layer = fqt.QuantLinear(6, 3, recipe=recipe, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer.scale[...], jnp.abs(layer.kernel[...]).mean(0), rtol=1e-6)
    x = jnp.ones((4, 6))
    graphdef, params = nnx.split(layer)
    grads = jax.grad(lambda params: nnx.merge(graphdef, params)(x).sum())(params)
    signs = jnp.where(layer.kernel[...] >= 0, 1.0, -1.0)
    np.testing.assert_array_equal(grads["scale"][...], 4 * signs.sum(0))


def test_the_learned_scale_may_start_at_one():
    recipe = dataclasses.replace(fqt.QAT, scale="learned_from_one")
    net = nnx.Sequential(*[nnx.Linear(6, 6, rngs=nnx.Rngs(0)) for _ in range(3)])
    layer = fqt.quantize(net, recipe).model.layers[1]
    assert isinstance(layer.scale, nnx.Param)
    np.testing.assert_array_equal(layer.scale[...], np.ones(6))
    x = jax.random.normal(jax.random.key(0), (4, 6))
    signs = fqt.binarize(x) @ fqt.binarize(layer.kernel[...])
    np.testing.assert_allclose(layer(x), signs + layer.bias[...].reshape(1, 6))


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.slow
def test_outputs_are_laid_out_as_those_of_flax():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.sharding.PartitionSpec("data")
    rngs = nnx.Rngs(0)
    with jax.sharding.set_mesh(mesh):
        for ours, theirs, shape in (
            (fqt.QuantLinear(6, 3, rngs=rngs), nnx.Linear(6, 3, rngs=rngs), (8, 6)),
            (fqt.QuantConv(6, 3, 3, rngs=rngs), nnx.Conv(6, 3, (3, 3), rngs=rngs), (8, 4, 4, 6)),
        ):
            x = jnp.ones(shape)
            expected = jax.typeof(theirs(x, out_sharding=spec))
            assert jax.typeof(ours(x, out_sharding=spec)) == expected


def test_recipes_without_randomness_keep_no_stream():
    assert not nnx.state(fqt.QuantLinear(2, 2, recipe=fqt.QAT, rngs=nnx.Rngs(0)), nnx.RngState)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: fqt.QuantConv(0, 4, 3, rngs=r), "must be positive"),
        (lambda r: fqt.QuantConv(4, 4, (3, 3, 3, 3), rngs=r), "one to three numbers"),
        (lambda r: fqt.QuantLinear(4, 4, implementation="cuda", rngs=r), "unknown implementation"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(nnx.Rngs(0))
