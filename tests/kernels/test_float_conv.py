"""Float convolutions and their gradients, by every implementation, against NumPy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fqt_jax as fqt
from fqt_jax import kernels
from fqt_jax.kernels import Window, native
from tests import reference
from tests.kernels import operations

each = pytest.mark.parametrize("implementation", operations.each_of("float_conv"))
needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="no extension")


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


def operands(case, scale=1.0):
    n, size, c, o, window, seed = case
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, *size, c)).astype(np.float32) * np.float32(scale)
    w = rng.normal(size=(*window.size, c, o)).astype(np.float32)
    g = rng.normal(size=(n, *window.output_size(size), o)).astype(np.float32)
    return x, w, g, window


def in_numpy(x, w, g, window):
    """The convolution and its two gradients."""
    rest = (window.strides, window.padding)
    return [
        reference.conv(x, w, *rest),
        reference.conv_input_grad(g, w, *rest, x.shape[1:3]),
        reference.conv_weight_grad(x, g, window.size, *rest),
    ]


def by(implementation, x, w, g, window):
    to = {"implementation": implementation}
    return [
        kernels.float_conv(x, w, window, **to),
        kernels.float_conv_input_grad(g, w, window, x.shape[1:3], **to),
        kernels.float_conv_weight_grad(x, g, window, **to),
    ]


def assert_agrees(implementation, x, w, g, window):
    """Equal but for the rounding of sums whose terms have these absolute values in all."""
    wide = [a.astype(np.float64) for a in (x, w, g)]
    expected, magnitudes = in_numpy(*wide, window), in_numpy(*map(np.abs, wide), window)
    results = by(implementation, *map(jnp.asarray, (x, w, g)), window)
    for got, value, magnitude in zip(results, expected, magnitudes, strict=True):
        assert (got.shape, got.dtype) == (value.shape, jnp.float32)
        assert np.all(np.abs(np.asarray(got) - value) <= 1e-5 * magnitude)


@each
@settings(max_examples=15)
@given(case=cases())
def test_agrees_with_numpy(implementation, case):
    assert_agrees(implementation, *operands(case))


# Beyond what the native kernels serve: many channels, pointwise, dense, few positions.
WIDE = {
    "channels": (2, (5, 6), 24, 16, Window((3, 3), (2, 1), ((1, 1), (0, 1))), 0),
    "pointwise": (2, (4, 3), 5, 7, Window((1, 1), (2, 2)), 1),
    "dense": (3, (2, 2), 40, 9, Window(), 2),
    "one position": (3, (3, 3), 20, 8, Window((3, 3)), 3),
    "few positions": (2, (2, 2), 33, 16, Window((3, 3), (1, 1), ((1, 1), (1, 1))), 4),
}


@each
@pytest.mark.parametrize("name", WIDE)
def test_other_sizes(implementation, name):
    assert_agrees(implementation, *operands(WIDE[name]))


@each
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales(implementation, scale):
    case = (2, (5, 6), 3, 17, Window((3, 3), (1, 1), ((1, 1), (1, 1))), 0)
    assert_agrees(implementation, *operands(case, scale))


@each
@pytest.mark.parametrize("empty", ["n", "c", "o"])
def test_of_nothing(implementation, empty):
    sizes = {"n": 2, "c": 3, "o": 4, empty: 0}
    case = (sizes["n"], (4, 5), sizes["c"], sizes["o"], Window((3, 3)), 0)
    x, w, g, window = operands(case)
    results = by(implementation, *map(jnp.asarray, (x, w, g)), window)
    for got, like in zip(results, (g, x, w), strict=True):
        np.testing.assert_array_equal(got, np.zeros_like(like))


@each
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_single(implementation, dtype):
    x, w, g, window = operands((2, (5, 6), 3, 17, Window((3, 3)), 0))
    halves = [jnp.asarray(a).astype(dtype) for a in (x, w, g)]
    results = by(implementation, *halves, window)
    wide = [np.asarray(a.astype(jnp.float32), np.float64) for a in halves]
    for got, expected in zip(results, in_numpy(*wide, window), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@needs_native
def test_layers_use_the_native_kernels_for_single_precision_alone():
    x = jax.random.normal(jax.random.key(0), (3, 9, 8, 3))
    w = jax.random.normal(jax.random.key(1), (3, 3, 3, 20))

    def loss(implementation):
        def run(x, w):
            y = fqt.conv(x, w, recipe=fqt.FULL_PRECISION, implementation=implementation)
            return jnp.sum(jnp.sin(y.astype(jnp.float32)))

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1)))

    calls = ("@fqt_jax_float_conv(", "@fqt_jax_float_conv_weight_grad(")
    for implementation, is_native in ((None, True), ("native", True), ("xla", False)):
        text = loss(implementation).lower(x, w).as_text()
        assert all((call in text) == is_native for call in calls)
    text = loss("native").lower(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)).as_text()
    assert not any(call in text for call in calls)
    for a, b in zip(
        *(jax.tree.leaves(loss(name)(x, w)) for name in ("native", "xla")), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


X, W, G = jnp.zeros((1, 4, 4, 3)), jnp.zeros((3, 3, 3, 8)), jnp.zeros((1, 2, 2, 8))
WINDOW = Window((3, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"x must be \[N, H, W, C\] and w"),
        ({"w": W[0]}, r"x must be \[N, H, W, C\] and w"),
        ({"w": jnp.zeros((3, 3, 2, 8))}, r"w must have the shape \(3, 3, 3, 8\)"),
        ({"w": jnp.zeros((3, 2, 3, 8))}, r"w must have the shape \(3, 3, 3, 8\)"),
        ({"x": X[:, :2]}, "larger than the padded input"),
    ],
)
def test_operands_that_do_not_fit(change, message):
    operands = {"x": X, "w": W, **change}
    with pytest.raises(ValueError, match=message):
        kernels.float_conv(**operands, window=WINDOW)


def test_gradients_that_do_not_fit():
    message = r"g must have the shape \(1, 2, 2, 8\) of the output"
    for g in (G[:, 1:], G[..., 1:]):
        with pytest.raises(ValueError, match=message):
            kernels.float_conv_input_grad(g, W, WINDOW, (4, 4))
    for g in (G[:, 1:], jnp.concatenate([G, G])):
        with pytest.raises(ValueError, match=message):
            kernels.float_conv_weight_grad(X, g, WINDOW)
