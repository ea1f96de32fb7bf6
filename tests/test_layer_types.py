"""One entry for a type of layer is all that conversion, taps, budgets and estimators need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqt_jax as fqt
from fqt_jax import diagnostics
from fqt_jax.estimators import OneDraw
from fqt_jax.estimators.base import SplitModel
from fqt_jax.kernels.contract import Window
from fqt_jax.layer_types import LAYER_TYPES, Linear, quantized_layers, type_of
from fqt_jax.losses import CrossEntropy

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)


class Mirrored(nnx.Linear):
    """A user's layer."""

    def __call__(self, x):
        return super().__call__(jnp.flip(x, -1))


class QuantMirrored(fqt.QuantLinear):
    def __call__(self, x):
        kept.append(self.recipe.gradient and self.recipe.gradient.keep_fraction)
        return super().__call__(jnp.flip(x, -1))


kept: list[float | None] = []


class MirroredType(Linear):
    float_type = Mirrored
    quantized_type = QuantMirrored

    def float_reason(self, layer):
        return "small" if layer.out_features < 4 else None


@pytest.fixture
def mirrored():
    LAYER_TYPES.insert(0, MirroredType())
    kept.clear()
    yield
    del LAYER_TYPES[0]


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.middle = Mirrored(8, 8, rngs=rngs)
        self.small = Mirrored(8, 3, rngs=rngs)
        self.last = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.small(self.middle(self.first(x))))


@pytest.mark.slow
def test_a_new_type_is_one_entry(mirrored):
    net = Net(nnx.Rngs(0))
    model, table = fqt.quantize(net, fqt.FQT1)
    assert [(row.path, row.kind, row.reason) for row in table] == [
        ("first", "Linear", "first layer"),
        ("middle", "Mirrored", "default"),
        ("small", "Mirrored", "small"),
        ("last", "Linear", "classifier"),
    ]
    assert type(model.middle) is QuantMirrored
    x = jax.random.normal(KEY, (8, 6))
    float_model, _ = fqt.quantize(net, fqt.FULL_PRECISION)
    np.testing.assert_allclose(float_model(x), net(x), rtol=1e-4, atol=1e-5)
    labels = jnp.arange(8) % 3
    budget = diagnostics.budget(model, x)
    assert [(b.path, b.weight_bits) for b in budget][1] == ("middle", 1)
    assert list(diagnostics.layer_gradients(model, x, labels, key=KEY)) == ["middle"]
    kept.clear()
    OneDraw(0.5).gradients(SplitModel.of(model), (x, labels), CrossEntropy(num_classes=3), KEY)
    assert set(kept) == {0.25, 1.0, None}  # the full pass, and that of the drawn rows


def test_without_its_entry_the_type_is_refused():
    with pytest.raises(ValueError, match="middle cannot be quantized: Mirrored is a subclass"):
        fqt.quantize(Net(nnx.Rngs(0)), fqt.FQT1)


LAYERS = [
    (nnx.Conv, (4, 5, (3, 3)), {"strides": 2}, (2, 3, 8, 8, 4)),
    (nnx.Conv, (4, 5, (3,)), {"padding": "CAUSAL"}, (2, 8, 4)),
    (nnx.Conv, (4, 6, (3, 3)), {"feature_group_count": 2}, (2, 8, 8, 4)),
    (nnx.Conv, (4, 8, (3, 3)), {"feature_group_count": 4}, (2, 8, 8, 4)),
    (nnx.Conv, (4, 5, (3, 3)), {"kernel_dilation": 2, "padding": "CIRCULAR"}, (2, 8, 8, 4)),
    (
        nnx.Conv,
        (4, 5, (3, 2)),
        {"input_dilation": (2, 1), "padding": ((1, 1), (0, 2))},
        (2, 8, 8, 4),
    ),
    (nnx.Conv, (4, 5, (3, 2, 1)), {"strides": (1, 2, 1)}, (2, 5, 6, 7, 4)),
    (nnx.ConvTranspose, (4, 5, (3, 3)), {"strides": 2}, (2, 3, 8, 8, 4)),
    (nnx.ConvTranspose, (4, 5, (3,)), {"padding": "VALID", "kernel_dilation": 2}, (2, 8, 4)),
    (nnx.Linear, (4, 5), {}, (2, 3, 4)),
    (nnx.LinearGeneral, (4, (2, 3)), {}, (5, 7, 4)),
    (nnx.LinearGeneral, ((3, 4), 5), {"axis": (1, -1)}, (5, 3, 7, 4)),
    (nnx.Einsum, ("btd,hdk->bhtk", (2, 4, 3), (2, 3)), {}, (5, 7, 4)),
    (nnx.Einsum, ("...hk,dhk->...d", (6, 2, 3), (6,)), {}, (5, 7, 2, 3)),
]


# Every type stays among the quick ones; the rest runs with the slow tests.
QUICK = (0, 3, 4, 7, 9, 10, 12)
CASES = [
    pytest.param(*layer, marks=[pytest.mark.slow] * (i not in QUICK))
    for i, layer in enumerate(LAYERS)
]


@pytest.mark.parametrize(("kind", "sizes", "options", "shape"), CASES)
def test_an_entry_knows_its_layers(kind, sizes, options, shape):
    layer = kind(*sizes, rngs=nnx.Rngs(0), **options)
    entry = type_of(layer)
    assert entry.kind == kind.__name__
    assert entry.obstacle(layer) is None
    new = entry.quantized(layer, fqt.FULL_PRECISION, None, nnx.Rngs(0))
    assert type(new) is entry.quantized_type
    assert type_of(new) is entry
    assert new.kernel is layer.kernel
    assert new.bias is layer.bias
    x = jax.random.normal(KEY, shape)
    np.testing.assert_allclose(new(x), layer(x), rtol=1e-4, atol=1e-5)
    images, out = entry.input_images(new, x), entry.output_images(new, new(x))
    assert images.shape == entry.input_images(layer, x).shape
    assert out.shape == entry.output_images(layer, layer(x)).shape
    window = entry.window(layer, images.shape[1:3])
    assert window == entry.window(new, images.shape[1:3])
    assert (window is None) == bool(entry.why_slow(layer))
    if window is not None:
        assert out.shape[:3] == (images.shape[0], *window.output_size(images.shape[1:3]))
        assert entry.terms(new) == images.shape[3] * np.prod(window.size)


@pytest.mark.parametrize(("kind", "sizes", "options", "shape"), CASES)
def test_a_binary_layer_is_the_float_one_on_signs(kind, sizes, options, shape):
    """Output and gradients with float gradients, and the scale of each output channel."""
    layer = kind(*sizes, rngs=nnx.Rngs(0), **options)
    new = type_of(layer).quantized(layer, fqt.QAT, None, nnx.Rngs(0))
    layer.bias[...] = jnp.arange(layer.bias.size, dtype=jnp.float32).reshape(layer.bias.shape)
    x = jax.random.normal(KEY, shape)
    alpha = type_of(layer).mean_abs(layer)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def on_signs(params, x):
        signs = nnx.merge(graphdef, params, rest, copy=True)
        kernel, bias = params["kernel"][...], params["bias"][...]
        signs.kernel[...] = fqt.binarize(kernel)
        signs.bias[...] = jnp.zeros_like(bias)
        outs = type_of(layer).output_images(layer, signs(fqt.binarize(x)))
        outs = outs * type_of(layer).mean_abs(nnx.merge(graphdef, params, rest, copy=True))
        return outs + bias.reshape(-1)

    binary, _, binary_rest = nnx.split(new, nnx.Param, ...)

    def in_bits(params, x):
        return type_of(new).output_images(new, nnx.merge(binary, params, binary_rest)(x))

    np.testing.assert_allclose(in_bits(params, x), on_signs(params, x), rtol=1e-4, atol=1e-4)
    assert alpha.shape == (layer.bias.size,)

    def gradients(function):
        return jax.grad(lambda *args: jnp.sum(jnp.cos(function(*args))), (0, 1))(params, x)

    got, expected = gradients(in_bits), gradients(on_signs)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))


def test_other_modules_have_no_entry():
    with pytest.raises(TypeError, match="BatchNorm is no layer that can be quantized"):
        type_of(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("conv", "shape", "images", "terms"),
    [
        ({"kernel_size": (3,)}, (2, 10, 4), (2, 1, 10, 4), 12),
        ({"kernel_size": (3, 2, 1)}, (2, 5, 6, 7, 4), (2, 30, 7, 4), 24),
        ({"kernel_size": (3, 3), "feature_group_count": 2}, (2, 5, 5, 4), (2, 5, 5, 4), 18),
        ({"kernel_size": (3, 3), "kernel_dilation": 2}, (2, 5, 5, 4), (2, 5, 5, 4), 36),
    ],
)
def test_layers_that_stay_float_are_counted_as_well(conv, shape, images, terms):
    model = nnx.Conv(4, 6, rngs=nnx.Rngs(0), **conv)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    (layer,) = diagnostics.layer_shapes(model, x)
    assert (layer.input, layer.output, layer.terms) == (images, (*images[:3], 6), terms)
    assert layer.products == np.prod(images[:3]) * 6 * terms
    assert (layer.window is None) == (len(conv["kernel_size"]) != 1)
    (cost,) = diagnostics.budget(model, x)
    assert (cost.weights, cost.activations) == (6 * terms, np.prod(images))


def test_the_window_is_that_of_the_product():
    model = nnx.Conv(4, 6, (3, 3), strides=2, rngs=nnx.Rngs(0))
    (layer,) = diagnostics.layer_shapes(model, jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32))
    assert layer.window == Window((3, 3), (2, 2), ((0, 1), (0, 1)))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.zebra = nnx.Linear(4, 4, rngs=rngs)
        self.ant = self.zebra
        self.last = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.ant(self.zebra(self.first(x))))


@pytest.mark.usefixtures("graph_mode")
def test_a_layer_in_two_places_stays_one():
    model, table = fqt.quantize(Tied(nnx.Rngs(0)), fqt.QAT)
    assert [row.path for row in table] == ["first", "zebra", "last"]
    assert type(model.zebra) is fqt.QuantLinear
    assert model.zebra is model.ant
    assert len(quantized_layers(model)) == 3
    with pytest.raises(ValueError, match="called more than once: ant"):
        diagnostics.layer_gradients(model, jnp.ones((3, 4)), jnp.arange(3), key=KEY)
