"""Self-attention, by every implementation, against NumPy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fqt_jax as fqt
from tests.kernels import operations

each = pytest.mark.parametrize("implementation", operations.implementations("attention"))

SHAPES = [(1, 1, 1, 1), (2, 5, 3, 7), (1, 33, 2, 32), (2, 70, 1, 9), (0, 4, 2, 8), (2, 3, 0, 4)]


def attended(qkv: np.ndarray, is_causal: bool) -> np.ndarray:
    """``softmax(Q K^T / sqrt(D)) V`` in float64."""
    q, k, v = (part.transpose(0, 2, 1, 3) for part in np.moveaxis(qkv.astype(np.float64), 2, 0))
    s = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
    if is_causal:
        s = np.where(np.tri(s.shape[-1]) > 0, s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True, initial=-1e30))
    return (p / p.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3)


@each
@given(
    shape=st.sampled_from(SHAPES),
    is_causal=st.booleans(),
    size=st.sampled_from([1e-20, 1.0, 30.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_values_are_those_of_the_definition(implementation, shape, is_causal, size, seed):
    n, length, heads, d = shape
    qkv = np.random.default_rng(seed).normal(size=(n, length, 3, heads, d)).astype(np.float32)
    qkv[:, :, :2] *= np.float32(size)
    got = fqt.self_attention(jnp.asarray(qkv), is_causal=is_causal, implementation=implementation)
    np.testing.assert_allclose(np.asarray(got), attended(qkv, is_causal), atol=2e-4 * max(1, size))


@each
@pytest.mark.parametrize("is_causal", [True, False])
def test_gradient_is_the_slope_along_any_direction(implementation, is_causal):
    rng = np.random.default_rng(0)
    qkv, way = rng.normal(size=(2, 2, 37, 3, 2, 5))
    dy = rng.normal(size=(2, 37, 2, 5))

    def attend(x):
        return fqt.self_attention(x, is_causal=is_causal, implementation=implementation)

    _, vjp = jax.vjp(attend, jnp.asarray(qkv, jnp.float32))
    (got,) = vjp(jnp.asarray(dy, jnp.float32))
    step = 1e-5
    up, down = (attended(qkv + sign * step * way, is_causal) for sign in (1, -1))
    slope = np.sum((up - down) / (2 * step) * dy)
    np.testing.assert_allclose(np.sum(np.asarray(got) * way), slope, rtol=1e-4)


@pytest.mark.usefixtures("relaxed_promotion")
@each
def test_other_floats_keep_their_type(implementation):
    qkv = jax.random.normal(jax.random.key(0), (2, 4, 3, 2, 8), jnp.bfloat16)
    y, vjp = jax.vjp(lambda x: fqt.self_attention(x, implementation=implementation), qkv)
    assert y.dtype == jnp.bfloat16
    assert vjp(y)[0].dtype == jnp.bfloat16
    expected = attended(np.asarray(qkv, np.float32), False)
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=0.03)


@each
def test_nan_stays_in_its_head(implementation):
    qkv = jnp.ones((2, 3, 3, 2, 4)).at[1, 0, 0, 1, 0].set(jnp.nan)
    y = np.asarray(fqt.self_attention(qkv, implementation=implementation))
    assert np.isnan(y).any((1, 3)).tolist() == [[False, False], [False, True]]


def test_backward_keeps_the_input_alone():
    qkv = jnp.ones((2, 64, 3, 2, 8))
    _, vjp = jax.vjp(fqt.self_attention, qkv)
    assert [leaf.shape for leaf in jax.tree.leaves(vjp)] == [qkv.shape]


@pytest.mark.parametrize(
    ("qkv", "error", "message"),
    [
        (jnp.ones((2, 4, 2, 2, 8)), ValueError, r"qkv must be \[N, T, 3, H, D\]"),
        (jnp.ones((2, 4, 3, 8)), ValueError, r"qkv must be \[N, T, 3, H, D\]"),
        (jnp.ones((2, 4, 3, 2, 8), jnp.int32), TypeError, "qkv"),
    ],
)
def test_what_does_not_fit_is_one_line(qkv, error, message):
    with pytest.raises(error, match=message) as raised:
        fqt.self_attention(qkv)
    assert "\n" not in str(raised.value)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        fqt.self_attention(jnp.ones((1, 1, 3, 1, 1)), implementation="fast")
