"""Taps, budgets and the diagnosis of whole models, on models small enough to do by hand."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fqt_jax as fqt
from fqt_jax import FQT1, FQT1_PLUS, QAT, PackedBits, diagnostics, theory
from fqt_jax.models import VGG
from fqt_jax.training import create_state
from tests import reference
from tests.test_functional import normal
from tests.test_gradients import Plain

KEY = jax.random.key(11)
LABELS = jnp.arange(16) % 3
BATCH = jax.ShapeDtypeStruct((16, 6), jnp.float32)


pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def loss_gradient(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return (p - np.eye(3)[np.asarray(LABELS)]) / 16


def plain(recipe):
    return fqt.quantize(Plain(nnx.Rngs(0)), recipe).model


@pytest.mark.parametrize("scale", ["mean_abs", "learned"])
def test_the_gradient_of_a_layer_inside_a_model(scale):
    model = plain(dataclasses.replace(QAT, scale=scale))
    if scale == "learned":
        model.middle.scale[...] = jnp.linspace(-1.0, 2.0, 12)
    x = 2 * normal(0, 16, 6)
    [layer] = diagnostics.layer_gradients(model, x, LABELS, key=KEY, passes=1).values()
    w = np.float64(model.middle.kernel[...])
    alpha = {
        "mean_abs": np.abs(w).mean(axis=0),
        "learned": np.linspace(-1, 2, 12),
    }[scale]
    expected = alpha * (loss_gradient(np.float64(model(x))) @ np.float64(model.last.kernel[...]).T)
    assert layer.path == "middle"
    np.testing.assert_allclose(layer.g.reshape(16, 12), expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(layer.exact_g, layer.g, rtol=1e-5, atol=1e-8)
    assert layer.noise == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("prune", ["channels", "shared"])
def test_noise_of_the_weights_gradient(prune):
    """A model of one layer, whose noise the theory gives in full."""
    recipe = fqt.Recipe(gradient=fqt.GradientQuantizer(bits=4, prune=prune), scale="none")
    model = fqt.QuantLinear(6, 3, recipe=recipe, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.clip(model.kernel[...], -0.9, 0.9)
    x = normal(1, 16, 6)
    [layer] = diagnostics.layer_gradients(model, x, LABELS, key=KEY, passes=800).values()
    g = np.asarray(layer.g, np.float64).reshape(16, 3)
    signs = reference.signs(np.asarray(x))
    error = theory.gradient_error(layer.g, recipe.gradient, product="weight")
    # Rounding noise is independent from entry to entry, and each meets 6 inputs of size 1.
    rounding = 6 * error.rounding
    if prune == "channels":
        p = theory.group_probabilities(layer.g, recipe.gradient, axis=3)
        mask = ((1 - p) / p * ((signs.T @ g) ** 2).sum(axis=0)).sum()
    else:
        p = theory.group_probabilities(layer.g, recipe.gradient, axis=0)
        parts = signs[:, :, None] * g[:, None, :]
        mask = theory.sampled_sum_variance(parts, p, "systematic")
    assert layer.noise**2 == pytest.approx(rounding + mask, rel=0.1)
    assert layer.signal == pytest.approx(np.linalg.norm(signs.T @ g), rel=1e-4)


@pytest.fixture(scope="module")
def float_vgg():
    return VGG(((8, 8),), num_classes=3, in_features=1, rngs=nnx.Rngs(0))


def test_diagnosis_of_a_model(float_vgg):
    graphdef, state = create_state(fqt.quantize(float_vgg, FQT1).model, optax.sgd(0.1))
    before = jax.tree.map(np.array, state.params)
    x = normal(0, 16, 8, 8, 1)
    flipped = jax.tree.map(lambda a: -a, state.params)
    found = diagnostics.diagnose(graphdef, state, x, LABELS, KEY, previous=flipped)
    again = diagnostics.diagnose(graphdef, state, x, LABELS, KEY, previous=flipped)
    assert found == again == json.loads(json.dumps(found))
    assert all(math.isfinite(value) for value in found.values())
    layers = dict.fromkeys(name.rpartition("/")[0] for name in found)
    assert list(layers) == ["features/layers/3", "all"]
    for path in list(layers)[:1]:
        assert found[f"{path}/samples"] == 16
        assert 1 <= found[f"{path}/effective_samples"] <= 16
        assert 1 <= found[f"{path}/effective_channels"] <= found[f"{path}/channels"] == 8
        assert found[f"{path}/sign_flip_ratio"] == 1
        ratio = found[f"{path}/kernel_noise_to_signal"]
        assert ratio > 0
        assert found[f"{path}/past_stall_threshold"] == (ratio > 3**-0.5)
        assert found[f"{path}/input_noise_to_signal"] > 0.1
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (diagnostics.stall_warning(found) is None) == (
        not any(found[f"{path}/past_stall_threshold"] for path in list(layers)[:1])
    )


def test_models_without_quantized_layers_are_refused():
    with pytest.raises(ValueError, match="no quantized layer"):
        diagnostics.layer_gradients(Plain(nnx.Rngs(0)), normal(0, 16, 6), LABELS, key=KEY)
    with pytest.raises(ValueError, match="passes must be at least 1"):
        diagnostics.layer_gradients(plain(QAT), normal(0, 16, 6), LABELS, key=KEY, passes=0)


def test_a_layer_called_twice_is_refused():
    class Twice(nnx.Module):
        def __init__(self):
            self.layer = fqt.QuantLinear(3, 3, recipe=QAT, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(self.layer(x))

    with pytest.raises(ValueError, match="more than once: layer"):
        diagnostics.layer_gradients(Twice(), normal(0, 16, 3), LABELS, key=KEY)


def test_warning_names_the_layers():
    found = {"a/kernel_noise_to_signal": 0.57, "b/kernel_noise_to_signal": 0.58}
    assert "in 1 of 2 layers: b (0.58)" in diagnostics.stall_warning(found)
    assert diagnostics.stall_warning({"a/kernel_noise_to_signal": 0.57}) is None


@pytest.mark.parametrize("recipe", [FQT1, QAT, dataclasses.replace(QAT, scale="none", clip=False)])
def test_budget_counts_what_is_kept(float_vgg, recipe):
    model, _ = fqt.quantize(float_vgg, recipe)
    first, middle, head = found = diagnostics.budget(model, jnp.zeros((5, 6, 6, 1)))
    assert [layer.path for layer in found] == ["features/layers/0", "features/layers/3", "head"]
    bits = PackedBits.pack(jnp.zeros((5, 6, 6, 8), jnp.bool_)).nbytes
    sums = 2 * 5 * 6 * 6 * 8 if recipe.scale != "none" else 0
    assert middle.saved_bytes == bits * (2 if recipe.clip else 1) + sums
    assert middle.float_saved_bytes == 4 * 5 * 6 * 6 * 8
    assert first.saved_bytes == first.float_saved_bytes == 4 * 5 * 6 * 6
    assert (middle.weights, middle.weight_bits, middle.activation_bits) == (9 * 8 * 8, 1, 1)
    assert (head.weights, head.weight_bits) == (24, 32)
    # One sample of five at 4 bits, and two channels of eight.
    gradient = (0.8, 1.0) if recipe is FQT1 else (32, 32)
    assert (middle.input_gradient_bits, middle.weight_gradient_bits) == gradient
    assert found.weight_bytes == 4 * 72 + 9 * 8 * 8 // 8 + 4 * 24
    assert "features/layers/3" in str(found)


def test_budget_of_shared_samples_and_of_float():
    [layer] = diagnostics.budget(plain(fqt.QAT_ACTIVATIONS), BATCH)[1:2]
    assert (layer.weight_bits, layer.activation_bits, layer.input_gradient_bits) == (32, 1, 32)
    assert layer.saved_bytes == layer.float_saved_bytes + layer.activations
    [layer] = diagnostics.budget(plain(FQT1_PLUS), BATCH)[1:2]
    assert (layer.input_gradient_bits, layer.weight_gradient_bits) == (1, 1)
    found = diagnostics.budget(Plain(nnx.Rngs(0)), BATCH)
    assert found.saved_bytes == found.float_saved_bytes == 4 * 16 * (6 + 12 + 12)
    assert found.weight_bytes == 4 * (6 * 12 + 12 * 12 + 12 * 3)
