import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqt_jax as fqt

CALIBRATED = dataclasses.replace(fqt.QAT, threshold="calibrated")
LEARNED = dataclasses.replace(fqt.FQT1, threshold="learned")


def batch(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(2, 3, shape), jnp.float32)


def network(recipe, act=nnx.relu):
    rngs = nnx.Rngs(0)
    conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
    net = nnx.Sequential(conv(3, 8), act, conv(8, 8), act, conv(8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fqt.quantize(net, recipe)[0]


def reference(x):
    rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return rows.mean(0), rows.std(0)


@pytest.mark.parametrize("recipe", [CALIBRATED, LEARNED], ids=["calibrated", "learned"])
def test_thresholds_are_means_and_spreads_deviations_layer_by_layer(recipe):
    model, x = network(recipe), batch(6, 5, 5, 3)
    before = nnx.state(nnx.clone(model))
    fqt.calibrate(model, x)
    h = x
    for layer in model.layers:
        if isinstance(layer, fqt.QuantConv) and layer.recipe.binary:
            mean, deviation = reference(h)
            np.testing.assert_allclose(layer.threshold[...], mean, rtol=1e-5)
            np.testing.assert_allclose(layer.spread[...], deviation, rtol=1e-5)
        h = layer(h)
    changed = {
        "/".join(map(str, path))
        for path, leaf in nnx.to_flat_state(nnx.state(model))
        if path[-1] not in ("key", "count")
        and not np.array_equal(leaf[...], dict(nnx.to_flat_state(before))[path][...])
    }
    names = {f"layers/{i}/{name}" for i in (2, 4) for name in ("threshold", "spread")}
    assert changed == names


def test_signs_behind_relu_see_both_sides_once_calibrated():
    model, x = network(CALIBRATED), batch(6, 5, 5, 3)
    after_first = fqt.sign_balance(model, x)[0]
    assert (after_first.path, after_first.positive) == ("layers/2", 1.0)
    assert after_first.one_sided == after_first.channels == 8
    table = fqt.calibrate(model, x)
    assert [row.one_sided for row in table] == [0, 0]
    assert all(0.2 < row.positive < 0.8 for row in table)
    assert fqt.sign_balance(model, x) == table


def test_a_threshold_is_of_the_kind_that_the_recipe_names():
    assert isinstance(network(LEARNED).layers[2].threshold, nnx.Param)
    assert not isinstance(network(CALIBRATED).layers[2].threshold, nnx.Param)
    assert network(fqt.QAT).layers[2].threshold is None


def test_constant_channels_keep_a_spread_of_one():
    layer = fqt.QuantLinear(3, 4, recipe=CALIBRATED, rngs=nnx.Rngs(0))
    x = jnp.array([[0.1, 0.0, 1.0], [0.1, 0.0, 3.0], [0.1, 0.0, 5.0]])
    table = fqt.calibrate(layer, x)
    np.testing.assert_allclose(layer.threshold[...], [0.1, 0, 3], rtol=1e-6)
    np.testing.assert_allclose(layer.spread[...], [1, 1, np.sqrt(8 / 3)], rtol=1e-6)
    assert table[0].one_sided == 2


def test_a_layer_that_is_called_twice_gets_the_mean_of_its_calls():
    class Twice(nnx.Module):
        def __init__(self):
            self.layer = fqt.QuantLinear(4, 4, recipe=CALIBRATED, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(self.layer(x))

    model, x = Twice(), batch(5, 4)
    fqt.calibrate(model, x)
    first = fqt.QuantLinear(4, 4, recipe=CALIBRATED, rngs=nnx.Rngs(0))
    fqt.calibrate(first, x)
    expected = np.mean([reference(x)[0], reference(first(x))[0]], axis=0)
    np.testing.assert_allclose(model.layer.threshold[...], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "x", "message"),
    [
        (fqt.QAT, jnp.ones((2, 5, 5, 3)), "no layer has a threshold: quantize with"),
        (CALIBRATED, jnp.ones((0, 5, 5, 3)), "the batch is empty"),
        (CALIBRATED, jnp.full((2, 5, 5, 3), jnp.nan), "layer layers/2 is given NaN"),
    ],
)
def test_what_cannot_be_calibrated(recipe, x, message):
    model = network(recipe)
    before = jax.tree.leaves(nnx.state(nnx.clone(model), nnx.BatchStat))
    with pytest.raises(ValueError, match=message):
        fqt.calibrate(model, x)
    for old, new in zip(before, jax.tree.leaves(nnx.state(model, nnx.BatchStat)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_signs_of_a_float_model():
    with pytest.raises(ValueError, match="no quantized layer"):
        fqt.sign_balance(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.ones((2, 2)))


def test_quantize_warns_of_signs_that_are_all_the_same():
    rngs = nnx.Rngs(0)
    norm = nnx.BatchNorm(4, rngs=rngs)
    pool = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))

    def warned(*between, recipe=fqt.QAT):
        conv = functools.partial(nnx.Conv, 4, 4, (3, 3), rngs=rngs)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            fqt.quantize(nnx.Sequential(conv(), *between, conv()), recipe)
        return [str(each.message) for each in found]

    [message] = warned(norm, nnx.relu, pool)
    assert message.startswith("every sign that layers/4 will see is +1, since relu returns no")
    assert "fqt_jax.calibrate(model, batch)" in message
    assert len(warned(nnx.sigmoid)) == 1
    assert len(warned(nnx.relu, recipe=fqt.QAT_ACTIVATIONS)) == 1
    assert warned(nnx.relu, norm) == warned(nnx.PReLU()) == warned(nnx.gelu) == []
    assert warned(nnx.relu, recipe=CALIBRATED) == []


def test_norms_take_the_statistics_of_all_batches():
    model = network(fqt.QAT, act=nnx.PReLU())
    net = nnx.Sequential(model, nnx.BatchNorm(4, rngs=nnx.Rngs(1)))
    batches = [batch(4, 5, 5, 3, seed=seed) for seed in range(3)]
    fqt.calibrate_norms(net, batches)
    outputs = np.concatenate([np.asarray(model(x), np.float64) for x in batches]).reshape(-1, 4)
    np.testing.assert_allclose(net.layers[1].mean[...], outputs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(net.layers[1].var[...], outputs.var(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [], "Linear has no batch norm"),
        (nnx.BatchNorm(2, rngs=nnx.Rngs(0)), [], "there is no batch"),
        (nnx.BatchNorm(2, rngs=nnx.Rngs(0)), [jnp.full((3, 2), jnp.inf)], "NaN or infinity"),
    ],
)
def test_norms_that_cannot_be_calibrated(model, batches, message):
    with pytest.raises(ValueError, match=message):
        fqt.calibrate_norms(model, batches)
