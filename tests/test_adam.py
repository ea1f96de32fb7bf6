"""Adam in place, against NumPy in float64 and against Optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqt_jax import kernels
from fqt_jax.kernels import native
from fqt_jax.optimizers import adam, scale_by_adam
from tests.kernels import operations

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="needs the extension")


def gradients(seed, shapes, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [scale * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


each = pytest.mark.parametrize("implementation", operations.each_of("adam"))


@each
@given(
    st.sampled_from([(), (1,), (37,), (3, 3, 8, 5)]),
    st.floats(0, 0.99),
    st.floats(0, 0.9999),
    st.sampled_from([1e-15, 1e-4, 1.0, 1e6]),
)
def test_steps_are_those_of_float64(implementation, shape, b1, b2, scale):
    eps = 1e-8
    m, v = np.zeros(shape), np.zeros(shape)
    state = (jnp.zeros(shape), jnp.zeros(shape))
    rng = np.random.default_rng(0)
    for t in range(1, 4):
        g = jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
        corrections = 1 - b1**t, 1 - b2**t
        factors = (1 - b1, b1, 1 - b2, b2, 1 / corrections[0], 1 / corrections[1], eps)
        direction, *state = kernels.adam(
            g, *state, jnp.asarray(factors, jnp.float32), implementation=implementation
        )
        g = np.asarray(g, np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        # What cancels among the terms of m is rounded relative to the terms.
        tolerance = 1e-5 * scale
        np.testing.assert_allclose(state[0], m, rtol=1e-5, atol=tolerance)
        np.testing.assert_allclose(state[1], v, rtol=1e-5, atol=1e-37)
        root = np.sqrt(v / corrections[1]) + eps
        atol = float(np.max(tolerance / corrections[0] / root))
        np.testing.assert_allclose(direction, m / corrections[0] / root, rtol=1e-4, atol=atol)


@each
@pytest.mark.parametrize("types", [(jnp.float16,) * 3, (jnp.bfloat16, jnp.float32, jnp.float32)])
def test_half_precision_is_computed_in_single(implementation, types):
    """Also under strict promotion of types."""
    factors = jnp.array([0.1, 0.9, 0.001, 0.999, 1, 1, 1e-8], jnp.float32)
    operands = [jnp.asarray([1.0, 0.5, 3.0], dtype) for dtype in types]
    with jax.numpy_dtype_promotion("strict"):
        got = kernels.adam(*operands, factors, implementation=implementation)
    expected = kernels.adam(*(a.astype(jnp.float32) for a in operands), factors)
    for a, b, dtype in zip(got, expected, types, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=float(jnp.finfo(dtype).eps))


@each
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_of_nothing(implementation, shape):
    none = jnp.zeros(shape)
    for a in kernels.adam(none, none, none, jnp.ones(7), implementation=implementation):
        assert a.shape == shape


def test_trajectory_is_optaxs_up_to_rounding():
    shapes = [(70_000,), (3, 3, 8, 5), ()]
    params = gradients(0, shapes)
    results = []
    for optimizer in (adam(1e-2), optax.adam(1e-2)):
        p, state = params, optimizer.init(params)
        update = jax.jit(optimizer.update)
        for t in range(5):
            updates, state = update(gradients(t, shapes), state, p)
            p = optax.apply_updates(p, updates)
        results.append((p, state))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), *results)


def test_operands_that_are_not_donated_survive():
    transform = scale_by_adam()
    g = jnp.arange(1.0, 100_001.0)
    state = transform.init(g)
    for update in (transform.update, jax.jit(transform.update)):
        update(g, state)
        np.testing.assert_array_equal(g, np.arange(1, 100_001, dtype=np.float32))
        assert not state.mu.any()
        assert not state.nu.any()


@needs_native
def test_moments_stay_where_they_are():
    transform = scale_by_adam()
    g = jnp.ones((512, 1024))

    def step(g, state):
        return transform.update(2 * g, state)

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(g, transform.init(g)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < g.nbytes / 8


@pytest.mark.parametrize("leaf", [jnp.zeros((0, 3)), jnp.ones(4, jnp.float16)])
def test_other_arrays_are_those_of_optax(leaf):
    params = {"a": jnp.ones(3), "b": leaf}
    ours, theirs = scale_by_adam(), optax.scale_by_adam()
    state = ours.init(params)

    def check(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        eps = jnp.finfo(a.dtype).eps if jnp.issubdtype(a.dtype, jnp.floating) else 0
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=4 * float(eps)
        )

    jax.tree.map(check, ours.update(params, state), theirs.update(params, state))


@each
def test_nan_goes_on(implementation):
    g = jnp.array([1.0, jnp.nan, 2.0])
    none = jnp.zeros(3)
    factors = jnp.array([0.1, 0.9, 0.001, 0.999, 10, 1000, 1e-8])
    for a in kernels.adam(g, none, none, factors, implementation=implementation):
        np.testing.assert_array_equal(np.isnan(a), [False, True, False])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"b1": 1.0}, "b1"), ({"b2": -0.1}, "b2"), ({"eps": -1.0}, "eps")],
)
def test_bad_numbers_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        scale_by_adam(**options)


@pytest.mark.parametrize(
    ("m", "factors", "message"),
    [
        (jnp.ones(3), jnp.ones(7), r"one shape; got \(4,\), \(3,\) and \(4,\)"),
        (jnp.ones(4), jnp.ones(6), r"factors must be float32\[7\]; got float32\[6\]"),
    ],
)
def test_operands_that_do_not_fit(m, factors, message):
    with pytest.raises(ValueError, match=message):
        kernels.adam(jnp.ones(4), m, jnp.ones(4), factors)


@needs_native
def test_results_must_lie_over_their_operands():
    like = jax.ShapeDtypeStruct((4,), jnp.float32)
    ones = jnp.ones(4)
    with pytest.raises(Exception, match="not that of its operand"):
        jax.block_until_ready(
            native.call("adam", (like, like, like), ones, ones, ones, jnp.ones(7))
        )
