"""The native convolution of images with few channels, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fqt_jax as fqt
from fqt_jax.kernels import native
from fqt_jax.kernels.contract import Window
from tests import reference

pytestmark = pytest.mark.skipif(
    native.unavailable() is not None, reason="the native kernels are not available"
)


@st.composite
def cases(draw):
    size = (draw(st.integers(1, 9)), draw(st.integers(1, 40)))
    kernel = tuple(draw(st.integers(1, 7)) for _ in range(2))
    strides = tuple(draw(st.integers(1, 3)) for _ in range(2))
    padding = tuple(
        (max(draw(st.integers(0, 3)), k - s), draw(st.integers(0, 3)))
        for k, s in zip(kernel, size, strict=True)
    )
    n = draw(st.sampled_from([1, 2, 5, 70]))
    c = draw(st.integers(1, 5))
    o = draw(st.sampled_from([1, 3, 8, 15, 16, 17, 33, 64]))
    return n, size, c, o, Window(kernel, strides, padding), draw(st.integers(0, 2**16))


def operands(case):
    n, size, c, o, window, seed = case
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, *size, c)).astype(np.float32)
    w = rng.normal(size=(*window.size, c, o)).astype(np.float32)
    g = rng.normal(size=(n, *window.output_size(size), o)).astype(np.float32)
    return x, w, g, window


def assert_sums_close(actual, expected, magnitude):
    """Equal but for the rounding of sums whose terms have these absolute values in all."""
    assert actual.shape == expected.shape
    assert np.all(np.abs(actual - expected) <= 1e-5 * magnitude)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_agrees_with_numpy(case):
    x, w, g, window = operands(case)
    wide = [a.astype(np.float64) for a in (x, w, g)]
    large = [np.abs(a) for a in wide]
    rest = (window.strides, window.padding)
    assert_sums_close(
        np.asarray(native.float_conv(x, w, window)),
        reference.conv(*wide[:2], *rest),
        reference.conv(*large[:2], *rest),
    )
    assert_sums_close(
        np.asarray(native.float_conv_weight_grad(x, g, window)),
        reference.conv_weight_grad(wide[0], wide[2], window.size, *rest),
        reference.conv_weight_grad(large[0], large[2], window.size, *rest),
    )


def test_the_layers_use_it_and_agree_with_xla():
    x = jax.random.normal(jax.random.key(0), (3, 9, 8, 3))
    w = jax.random.normal(jax.random.key(1), (3, 3, 3, 20))

    def loss(implementation):
        def run(x, w):
            y = fqt.conv(x, w, recipe=fqt.FULL_PRECISION, implementation=implementation)
            return jnp.sum(jnp.sin(y))

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1)))

    assert "fqt_jax_float_conv" in loss(None).lower(x, w).as_text()
    assert "fqt_jax_float_conv" not in loss("xla").lower(x, w).as_text()
    for a, b in zip(
        *(jax.tree.leaves(loss(name)(x, w)) for name in ("native", "xla")), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_dtypes_are_left_to_xla(dtype):
    x, w = jnp.ones((1, 4, 4, 3), dtype), jnp.ones((3, 3, 3, 8), dtype)
    run = jax.jit(lambda x, w: fqt.conv(x, w, recipe=fqt.FULL_PRECISION))
    assert "fqt_jax_float_conv" not in run.lower(x, w).as_text()
    assert run(x, w).dtype == dtype


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 4, 3), (3, 3, 3, 8)), "four axes"),
        (((1, 4, 5, 3), (3, 3, 3, 8)), "not the shape of its sizes"),
        (((1, 4, 4, 3), (3, 3, 3, 9)), "w has the wrong shape"),
    ],
)
def test_bad_operands_are_errors(shapes, message):
    x, w = (jnp.zeros(shape) for shape in shapes)
    out = jax.ShapeDtypeStruct((shapes[0][0], 4, 4, 8), jnp.float32)
    sizes = np.array((4, 4, 3, 8, 3, 3, 1, 1, 1, 1, 1, 1), np.int64)
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(native.call("float_conv", out, x, w, sizes=sizes))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 4, 4, 3), (1, 4, 5, 8)), "g has the wrong shape"),
        (((0, 4, 4, 3), (0, 4, 4, 8)), "empty"),
    ],
)
def test_bad_operands_of_the_gradient_are_errors(shapes, message):
    out = jax.ShapeDtypeStruct((3, 3, 3, 8), jnp.float32)
    sizes = np.array((4, 4, 3, 8, 3, 3, 1, 1, 1, 1, 1, 1), np.int64)
    x, g = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(native.call("float_conv_weight_grad", out, x, g, sizes=sizes))
