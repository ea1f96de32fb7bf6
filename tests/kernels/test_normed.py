"""A layer norm before a product, by every implementation, against NumPy in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqt_jax import kernels
from fqt_jax.kernels import Line, Normed
from tests.kernels import operations

each = pytest.mark.parametrize(
    "implementation", operations.each_of("encode_normed", "gradient_normed")
)
EDGE = 1e-4
"""Entries that lie this close to the edge of a sign, a mask or a kink may fall on either side."""


@dataclasses.dataclass
class Case:
    source: np.ndarray
    before: np.ndarray  # [6, C]
    after: np.ndarray
    epsilon: float
    d: np.ndarray  # of the samples kept
    samples: np.ndarray | None

    def normalized(self) -> tuple[np.ndarray, np.ndarray]:
        a = line(self.before, self.source.astype(np.float64))
        deviation = np.sqrt(a.var(-1, keepdims=True) + self.epsilon)
        return (a - a.mean(-1, keepdims=True)) / deviation, deviation

    def t(self) -> np.ndarray:
        return line(self.after, self.normalized()[0])

    def kept_d(self) -> np.ndarray:
        d = np.zeros(self.source.shape)
        d[slice(None) if self.samples is None else self.samples] = self.d
        return d

    def gradient(self) -> tuple[np.ndarray, Normed]:
        """By the chain rule, through a Jacobian of the norm that is written out."""
        s, c = self.source.astype(np.float64), self.source.shape[3]
        x, deviation = self.normalized()
        d = self.kept_d()
        h = slope(self.after, x) * d
        jacobian = (np.eye(c) - 1 / c - x[..., :, None] * x[..., None, :] / c) / deviation[
            ..., None
        ]
        e = np.einsum("nhwij,nhwj->nhwi", jacobian, h)
        sums = Normed(line_sums(self.before, s, e), line_sums(self.after, x, d))
        return slope(self.before, s) * e, sums

    @property
    def operands(self) -> tuple[Any, Normed, float]:
        normed = Normed(*(Line(*jnp.asarray(rows)) for rows in (self.before, self.after)))
        return jnp.asarray(self.source), normed, self.epsilon

    @property
    def backward(self) -> tuple[Any, Any]:
        return jnp.asarray(self.d), None if self.samples is None else jnp.asarray(self.samples)


def is_up(rows, v):
    return rows[0].astype(np.float64) * v + rows[1] >= 0


def line(rows, v):
    _, _, p1, q1, p0, q0 = rows.astype(np.float64)
    return np.where(is_up(rows, v), p1 * v + q1, p0 * v + q0)


def slope(rows, v):
    return np.where(is_up(rows, v), rows[2].astype(np.float64), rows[4])


def line_sums(rows, v, d) -> Line:
    up = is_up(rows, v)
    no = np.zeros(v.shape[3])
    q1, p1, q0, p0 = (part.sum((0, 1, 2)) for part in (d * up, d * v * up, d * ~up, d * v * ~up))
    return Line(no, no, p1=p1, q1=q1, p0=p0, q0=q0)


# A program is compiled for each of these: one channel, all widths of a vector, one position and
# several, no samples and none kept.
PROGRAMS = {
    "one entry": ((1, 1, 1, 1), np.int16, None),
    "dense": ((70, 1, 1, 33), np.int16, 20),
    "images": ((3, 2, 3, 31), np.int32, None),
    "floats": ((4, 1, 2, 64), np.float32, 2),
    "long rows": ((2, 1, 1, 700), np.float32, 1),
    "no samples": ((0, 2, 2, 8), np.int16, None),
    "none kept": ((3, 2, 2, 8), np.int32, 0),
}


@st.composite
def cases(draw) -> Case:
    """Kinks are continuous, as those of activations are; what is normalized may be tiny or huge."""
    shape, dtype, keep = draw(st.sampled_from(list(PROGRAMS.values())))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    source = rng.integers(-99, 99, shape)
    source = source.astype(dtype) if dtype != np.float32 else (source / 7).astype(dtype)
    size = 2.0 ** draw(st.sampled_from([-10, 0, 20]))

    def rows(factor):
        scale, offset = rng.normal(size=(2, shape[3])) * factor
        act = rng.choice([1, 0.25, 0])
        both = np.stack([scale, offset, scale, offset, act * scale, act * offset])
        return both.astype(np.float32)

    samples = None
    if keep is not None:
        samples = np.sort(rng.choice(shape[0], keep, replace=False)).astype(np.int32)
    d = rng.normal(size=(shape[0] if keep is None else keep, *shape[1:])).astype(np.float32)
    # A variance far below epsilon leaves rounding of the mean alone.
    return Case(source, rows(size), rows(1.0), 1e-5 * size * size, d, samples)


@each
@given(case=cases())
def test_encode_is_the_sign_of_the_normalized(implementation, case):
    source, normed, epsilon = case.operands
    signs, clip, nan = kernels.encode_normed(source, normed, epsilon, implementation=implementation)
    t = case.t()
    sure = np.abs(t) > EDGE
    np.testing.assert_array_equal(np.asarray(signs.unpack())[sure], (t >= 0)[sure])
    sure = np.abs(np.abs(t) - 1) > EDGE
    np.testing.assert_array_equal(np.asarray(clip.unpack())[sure], (np.abs(t) <= 1)[sure])
    assert not np.isnan(np.asarray(nan)).any()


@each
@given(case=cases())
def test_gradient_is_that_of_the_chain_rule(implementation, case):
    x, _ = case.normalized()
    near = [
        np.abs(rows[0].astype(np.float64) * v + rows[1]) <= EDGE * np.abs(rows[:2]).max(0) * size
        for rows, v, size in (
            (case.after, x, 1),
            (case.before, case.source.astype(np.float64), 1),
        )
    ]
    if any(
        np.any(of_one & (rows[2] != rows[4]))
        for of_one, rows in zip(near, (case.after, case.before), strict=True)
    ):
        return  # an entry on a kink may take either slope
    source, normed, epsilon = case.operands
    g, lo, hi, sums = kernels.gradient_normed(
        source, normed, epsilon, *case.backward, implementation=implementation
    )
    expected, expected_sums = case.gradient()
    size = np.abs(expected).max(initial=0) + 1e-30
    np.testing.assert_allclose(np.asarray(g) / size, expected / size, atol=3e-5)
    np.testing.assert_array_equal(np.asarray(lo), np.asarray(g).min((1, 2)))
    np.testing.assert_array_equal(np.asarray(hi), np.asarray(g).max((1, 2)))
    for got, wanted in zip(jax.tree.leaves(sums), jax.tree.leaves(expected_sums), strict=True):
        size = np.abs(wanted).max(initial=0) + 1e-30
        np.testing.assert_allclose(np.asarray(got) / size, wanted / size, atol=2e-3)


@each
def test_a_nan_reaches_its_own_sample_alone(implementation):
    source = jnp.ones((3, 1, 2, 5)).at[1, 0, 1, 2].set(jnp.nan)
    row = jnp.ones(5)
    normed = Normed(*[Line(row, row, row, row, row, row)] * 2)
    nan = kernels.encode_normed(source, normed, 1e-5, implementation=implementation)[2]
    assert np.isnan(np.asarray(nan)).tolist() == [False, True, False]
    d = jnp.ones(source.shape)
    g = kernels.gradient_normed(source, normed, 1e-5, d, None, implementation=implementation)[0]
    assert np.isnan(np.asarray(g)).any((1, 2, 3)).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": -1.0}, "epsilon must be a number from 0 on"),
        ({"epsilon": float("nan")}, "epsilon must be a number from 0 on"),
        ({"d": jnp.ones((2, 1, 1, 4))}, r"d must be float32\[3, 1, 1, 4\]"),
        ({"source": jnp.ones((3, 1, 1, 5))}, r"s must be float32\[5\]"),
    ],
)
def test_what_does_not_fit_is_one_line(change, message):
    row = jnp.ones(4)
    arguments = {
        "source": jnp.ones((3, 1, 1, 4)),
        "normed": Normed(*[Line(row, row, row, row, row, row)] * 2),
        "epsilon": 1e-5,
        "d": jnp.ones((3, 1, 1, 4)),
    } | change
    with pytest.raises(ValueError, match=message) as error:
        kernels.gradient_normed(**arguments, samples=None)
    assert "\n" not in str(error.value)
