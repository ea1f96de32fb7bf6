import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fqt_jax.models import MODELS, TOKEN_MODELS, create_model
from fqt_jax.models.common import avg_pool, scaled
from fqt_jax.pooling import max_pool

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def shapes(name: str, **options) -> list[tuple[int, ...]]:
    model = nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0), **options))
    return [leaf.shape for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


# Weights of the convolutions and, for ResNet, the classifier, in the published architectures:
# torchvision's resnet18 has 11,689,512 parameters, of which 9,600 are batch norm's; resnet34 has
# 21,797,672 and 17,024. VGG by configuration A, B, D, E of table 1 of arXiv 1409.1556, whose
# 3x3 weights are summed here from the channel counts alone.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", 11_689_512 - 9_600),
        ("resnet34", 21_797_672 - 17_024),
        # torchvision's resnet50 has 25,557,032 parameters, of which 53,120 are batch norm's.
        ("resnet50", 25_557_032 - 53_120),
        # Keras' MobileNet has 4,253,864, of which 43,776 are batch norm's, statistics included.
        ("mobilenet", 4_253_864 - 43_776),
        ("vgg11", 9_217_728 + 512 * 1000 + 1000),
        ("vgg13", 9_402_048 + 512 * 1000 + 1000),
        ("vgg16", 14_710_464 + 512 * 1000 + 1000),
        ("vgg19", 20_018_880 + 512 * 1000 + 1000),
    ],
)
def test_parameter_counts_are_those_of_the_published_architectures(name, expected):
    found = shapes(name, num_classes=1000, stem="imagenet")
    kernels = sum(math.prod(s) for s in found if len(s) in (2, 4))
    assert kernels + 1000 == expected
    norms_and_slopes = sum(math.prod(s) for s in found if len(s) < 2) - 1000
    assert 0 < norms_and_slopes < 0.006 * expected


@pytest.mark.parametrize("name", MODELS)
def test_every_model_maps_images_to_logits_or_tokens_to_those_of_the_next(name):
    def logits(x):
        return create_model(name, num_classes=7, in_features=1, rngs=nnx.Rngs(0))(x)

    if name in TOKEN_MODELS:
        assert jax.eval_shape(logits, jnp.ones((2, 12), jnp.int32)).shape == (2, 12, 7)
    else:
        assert jax.eval_shape(logits, jnp.ones((2, 32, 32, 1))).shape == (2, 7)


@pytest.mark.parametrize("name", ["vgg_small", "resnet18"])
def test_logits_are_finite(name):
    model = create_model(name, num_classes=7, in_features=1, width=0.125, rngs=nnx.Rngs(0))
    logits = nnx.jit(lambda model, x: model(x))(model, jnp.ones((2, 16, 16, 1)))
    assert np.isfinite(logits).all()


@pytest.mark.slow
def test_the_imagenet_stem_reduces_by_four():
    model = create_model("resnet18", num_classes=2, width=0.125, stem="imagenet", rngs=nnx.Rngs(0))
    assert model(jnp.ones((1, 64, 64, 3))).shape == (1, 2)
    assert model.stem.layers[0].kernel.shape == (7, 7, 3, 8)


@pytest.mark.parametrize(("width", "expected"), [(1.0, 64), (0.25, 16), (0.01, 8), (1.5, 96)])
def test_the_width_factor(width, expected):
    assert scaled(64, width) == expected


@pytest.mark.parametrize(("size", "shape"), [(2, (3, 9, 8, 5)), (3, (2, 7, 6, 4))])
def test_gradient_of_max_pool_goes_to_the_first_maximum(size, shape):
    x = jnp.asarray(np.random.default_rng(0).integers(-3, 4, shape), jnp.float32)

    def loss(pool, x):
        y = pool(jnp.sin(x))
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    def plain(x):
        return nnx.max_pool(x, (size, size), (size, size))

    got, expected = (
        jax.jit(jax.grad(functools.partial(loss, pool)))(x)
        for pool in (lambda x: max_pool(x, size), plain)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_max_pool_leaves_out_a_remainder():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    np.testing.assert_array_equal(max_pool(x, 2)[0, :, :, 0], [[6.0, 8.0]])


def test_avg_pool_averages_what_is_there_at_the_edge():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    np.testing.assert_allclose(avg_pool(x, 2)[0, :, :, 0], [[2.0, 3.5], [6.5, 8.0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vgg12"}, "unknown model 'vgg12'; known models: vgg_small"),
        ({"name": "vgg11", "width": 0}, "width must be positive"),
        ({"name": "resnet18", "width": float("nan")}, "width must be positive"),
        ({"name": "resnet18", "stem": "large"}, "'small' or 'imagenet'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_model(num_classes=2, rngs=nnx.Rngs(0), **options)


def test_vgg_refuses_images_that_its_stages_would_halve_to_nothing():
    model = create_model("vgg_small", num_classes=2, width=0.125, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="at least 8x8"):
        model(jnp.ones((1, 4, 4, 3)))
