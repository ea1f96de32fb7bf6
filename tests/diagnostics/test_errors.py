import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fqt_jax as fqt
from fqt_jax import GradientQuantizer
from fqt_jax.diagnostics import COMPARED, Quantization, measured_error, quantized_gradient
from fqt_jax.grouping import roundings
from fqt_jax.rounding import seeds_from_key
from tests import reference

KEY = jax.random.key(7)
OTHERS = {
    "shared by norm": Quantization(
        GradientQuantizer(2, 0.5, importance="norm", prune="shared"), "weight"
    ),
    "samples for both": Quantization(
        GradientQuantizer(4, groups="sample", prune="shared"), "weight"
    ),
    "pruned tensor": Quantization(GradientQuantizer(4, groups="tensor", prune="shared"), "weight"),
}
# The rest of what is compared differs from these in one part only.
EVERY = OTHERS | {
    name: COMPARED[name]
    for name in (
        "per_tensor", "psq", "per_channel", "agp_systematic/samples", "agp_systematic/channels",
        "agp_systematic/shared", "agp_bernoulli/channels", "agp_bernoulli/shared",
        "agp_uniform/shared", "agp_topk/channels",
    )
}  # fmt: skip


def gradient() -> jax.Array:
    """Small, as gradients of a mean loss are, and unlike from group to group."""
    rng = np.random.default_rng(3)
    g = rng.normal(size=(8, 2, 2, 12)) * rng.lognormal(size=(8, 1, 1, 1))
    return jnp.asarray(1e-9 * g * rng.lognormal(size=12), jnp.float32)


@pytest.mark.parametrize("name", sorted(EVERY))
def test_measured_error_is_the_predicted_one(name):
    g, quantization = gradient(), EVERY[name]
    measured = measured_error(g, quantization, KEY, draws=6000)
    predicted = quantization.predicted(g).total
    assert abs(measured.mean - predicted) < 4.5 * measured.standard_error + 1e-3 * predicted
    np.testing.assert_allclose(measured.mean, predicted, rtol=0.05)


@pytest.mark.parametrize("name", ["psq", "agp_bernoulli/channels", "pruned tensor"])
def test_a_draw_is_what_the_kernels_round(name):
    g, quantization = gradient(), EVERY[name]
    quantizer, product = quantization

    @jax.jit
    def draw(g):
        both = roundings(g, quantizer, seeds_from_key(KEY, 4))
        return quantized_gradient(g, quantization, KEY), both

    got, both = draw(g)
    _, expected = reference.quantized(np.asarray(g), both[0 if product == "input" else 1])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("prune", [pytest.param("channels", marks=pytest.mark.slow), "shared"])
def test_a_draw_is_what_the_layer_computes_with(prune):
    recipe = fqt.Recipe(gradient=GradientQuantizer(4, prune=prune), scale="none")
    rng = np.random.default_rng(0)
    x, w, g = (
        jnp.asarray(rng.normal(size=shape) * size, jnp.float32)
        for shape, size in (((12, 6), 1), ((6, 8), 0.3), ((12, 8), 1))
    )

    @jax.jit
    def weight_gradient(w, g):
        return jax.vjp(lambda w: fqt.dense(x, w, key=KEY, recipe=recipe), w)[1](g)[0]

    images = g.reshape(12, 1, 1, 8)
    drawn = quantized_gradient(images, Quantization(recipe.gradient, "weight"), KEY)
    expected = reference.signs(np.asarray(x)).T @ np.asarray(drawn, np.float64).reshape(12, 8)
    np.testing.assert_allclose(weight_gradient(w, g), expected, rtol=1e-4, atol=1e-4)


def test_nothing_to_measure():
    psq = COMPARED["psq"]
    assert measured_error(jnp.zeros((4, 1, 1, 4)), psq, KEY) == (0, 0)
    with pytest.raises(ValueError, match="at least 2; got 1"):
        measured_error(gradient(), psq, KEY, draws=1)
