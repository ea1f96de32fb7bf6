"""Adam in place, against NumPy in float64 and against Optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqt_jax.kernels import native
from fqt_jax.optimizers import adam, scale_by_adam

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="needs the extension")


def gradients(seed, shapes, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [scale * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@given(
    st.lists(st.integers(1, 40), min_size=0, max_size=3).map(tuple),
    st.floats(0, 0.99),
    st.floats(0, 0.9999),
    st.sampled_from([1e-15, 1e-4, 1.0, 1e6]),
)
def test_steps_are_those_of_float64(shape, b1, b2, scale):
    eps = 1e-8
    transform = scale_by_adam(b1, b2, eps)
    state = transform.init(jnp.zeros(shape))
    m, v = np.zeros(shape), np.zeros(shape)
    for t in range(1, 4):
        (g,) = gradients(t, [shape], scale)
        direction, state = transform.update(g, state)
        g = np.asarray(g, np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        # What cancels among the terms of m is rounded relative to the terms.
        tolerance = 1e-5 * scale
        np.testing.assert_allclose(state.mu, m, rtol=1e-5, atol=tolerance)
        np.testing.assert_allclose(state.nu, v, rtol=1e-5, atol=1e-37)
        correction1, correction2 = 1 - b1**t, 1 - b2**t
        root = np.sqrt(v / correction2) + eps
        expected = m / correction1 / root
        np.testing.assert_allclose(
            direction, expected, rtol=1e-4, atol=float(np.max(tolerance / correction1 / root))
        )
    assert int(state.count) == 3


@needs_native
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


@needs_native
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
def test_other_arrays_are_left_to_optax(leaf):
    params = {"a": jnp.ones(3), "b": leaf}
    ours, theirs = scale_by_adam(), optax.scale_by_adam()
    state = ours.init(params)
    jax.tree.map(
        np.testing.assert_array_equal,
        ours.update(params, state),
        theirs.update(params, state),
    )


def test_nan_goes_on():
    transform = scale_by_adam()
    g = jnp.array([1.0, jnp.nan, 2.0])
    direction, _ = transform.update(g, transform.init(g))
    np.testing.assert_array_equal(np.isnan(direction), [False, True, False])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"b1": 1.0}, "b1"), ({"b2": -0.1}, "b2"), ({"eps": -1.0}, "eps")],
)
def test_bad_numbers_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        scale_by_adam(**options)


@needs_native
@pytest.mark.parametrize(
    ("m", "factors", "message"),
    [(jnp.ones(3), jnp.ones(7), "same shape"), (jnp.ones(4), jnp.ones(6), "7 numbers")],
)
def test_bad_operands_are_errors(m, factors, message):
    like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4,), m.shape, (4,))]
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(
            native.call(
                "adam",
                tuple(like),
                jnp.ones(4),
                m,
                jnp.ones(4),
                factors,
                in_place={0: 0, 1: 1, 2: 2},
            )
        )


@needs_native
def test_results_must_lie_over_their_operands():
    like = jax.ShapeDtypeStruct((4,), jnp.float32)
    ones = jnp.ones(4)
    with pytest.raises(Exception, match="not that of its operand"):
        jax.block_until_ready(
            native.call("adam", (like, like, like), ones, ones, ones, jnp.ones(7))
        )
