"""Values near the end of float32, infinities and NaN: what the native kernels make of them.

A result is NaN, or infinite, only where exact arithmetic on the same operands makes it so: no
product or partial sum overflows before the whole does.
"""

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqt_jax import kernels
from fqt_jax.binarize import PackedBits
from fqt_jax.grouping import roundings
from fqt_jax.kernels import native, transforms
from fqt_jax.kernels.contract import Rounding, Window
from fqt_jax.kernels.scaling import gradient_codes
from fqt_jax.kernels.transforms import Flow, Line
from fqt_jax.recipe import GradientQuantizer

pytestmark = [
    pytest.mark.skipif(
        native.unavailable() is not None and shutil.which("c++") is None, reason="no C++ compiler"
    ),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

LARGE = [1e37, 1e38, 3e38, -1e37, -1e38, -3e38]
KINDS = st.sampled_from([LARGE, [*LARGE, np.inf], [*LARGE, np.inf, -np.inf], [*LARGE, np.nan]])
SEEDS = st.integers(0, 2**32 - 1)
WINDOW = Window((3, 3), (1, 1), ((1, 1), (1, 1)))
N, SIZE, C, FILTERS = 4, 4, 5, 19


def spiked(rng, shape, values) -> np.ndarray:
    """Normal numbers, and here and there one of ``values``."""
    a = rng.standard_normal(shape)
    where = rng.random(shape) < rng.choice([0.01, 0.1, 0.6])
    a[where] = rng.choice(values, where.sum())
    return a.astype(np.float32)


def assert_agrees(got, exact, size) -> None:
    """``got`` is ``exact`` in float32, up to rounding of terms whose absolute values sum to
    ``size``."""
    got = np.asarray(got, np.float64)
    rounding = np.nan_to_num(1e-5 * size, posinf=0)
    largest = float(np.finfo(np.float32).max)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(exact))
    is_in_doubt = np.abs(np.abs(exact) - largest) <= rounding
    overflows = np.where(np.abs(exact) > largest, np.sign(exact) * np.inf, exact)
    is_close = np.abs(got - overflows) <= rounding
    assert np.all((got == overflows) | is_close | np.isnan(got) | is_in_doubt)


def tap(a, i, j):
    """The input entries that a tap of the window meets, at each position; ``a[N, H, W, ...]``."""
    padded = np.pad(a, [(0, 0), (1, 1), (1, 1)] + [(0, 0)] * (a.ndim - 3))
    return padded[:, i : i + SIZE, j : j + SIZE]


def dequantized(rounding: Rounding, weights, sums, signs):
    """``weight (R / top sum + lo signs)`` and the size of its terms, all broadcast."""
    top = np.float32((1 << rounding.bits) - 1)
    step = (np.asarray(rounding.value_range) / top).astype(np.float64)
    lo = np.asarray(rounding.lo, np.float64)
    if rounding.groups == "samples":
        step, lo = (a.reshape(-1, 1, 1, 1) for a in (step, lo))
    value = weights * (step * sums + lo * signs)
    return value, np.abs(weights) * (np.abs(step * sums) + np.abs(lo * signs))


def expected_input_grad(g, w, rounding: Rounding):
    codes = np.asarray(gradient_codes(g, rounding), np.int64)
    signs = np.asarray(w.signs(jnp.int8), np.int64)
    sums, sign_sums = (np.zeros((len(codes), SIZE, SIZE, C), np.int64) for _ in range(2))
    for i in range(3):
        for j in range(3):
            sums += tap(codes, 2 - i, 2 - j) @ signs[i, j].T
            sign_sums += tap(np.ones_like(codes), 2 - i, 2 - j) @ signs[i, j].T
    if rounding.samples is None:
        return dequantized(rounding, 1.0, sums, sign_sums)
    weights = np.asarray(rounding.samples.weights, np.float64).reshape(-1, 1, 1, 1)
    kept = np.asarray(rounding.samples.indices)
    value, size = np.zeros((2, N, SIZE, SIZE, C))
    value[kept], size[kept] = dequantized(rounding, weights, sums, sign_sums)
    return value, size


def expected_weight_grad(g, x, rounding: Rounding):
    codes = np.asarray(gradient_codes(g, rounding), np.int64)
    signs = np.asarray(x.signs(jnp.int8), np.int64)
    if rounding.samples is not None:
        signs = signs[np.asarray(rounding.samples.indices)]
    shape = (3, 3, C, codes.shape[3])
    sums, sign_sums = np.zeros(shape, np.int64), np.zeros((*shape[:3], 1), np.int64)
    for i in range(3):
        for j in range(3):
            met = tap(signs, i, j)
            sums[i, j] = np.einsum("nhwc,nhwo->co", met, codes)
            sign_sums[i, j, :, 0] = met.sum((0, 1, 2))
    if rounding.channels is None:
        return dequantized(rounding, 1.0, sums, sign_sums)
    value, size = np.zeros((2, 3, 3, C, FILTERS))
    kept = np.asarray(rounding.channels.indices)
    weights = np.asarray(rounding.channels.weights, np.float64)
    value[..., kept], size[..., kept] = dequantized(rounding, weights, sums, sign_sums)
    return value, size


@st.composite
def products(draw):
    rng = np.random.default_rng(draw(SEEDS))
    g = jnp.asarray(spiked(rng, (N, SIZE, SIZE, FILTERS), draw(KINDS)))
    x = PackedBits.pack(jnp.asarray(rng.integers(0, 2, (N, SIZE, SIZE, C)).astype(bool)))
    w = PackedBits.pack(
        jnp.asarray(rng.integers(0, 2, (3, 3, C, FILTERS)).astype(bool)), batch_ndim=0
    )
    seeds = list(jnp.asarray(rng.integers(0, 2**32, (4, 2), np.uint32)))
    bits, keep = draw(st.sampled_from([(1, 1.0), (4, 1.0), (4, 0.5), (7, 0.5)]))
    prune = draw(st.sampled_from(["channels", "shared"]))
    return (
        g,
        x,
        w,
        roundings(g, GradientQuantizer(bits=bits, keep=keep, prune=prune), seeds),
    )


@given(products())
def test_products_overflow_only_as_a_whole(case):
    g, x, w, (for_input, for_weight) = case
    dx = kernels.input_grad(g, w, for_input, WINDOW, (SIZE, SIZE), implementation="native")
    assert_agrees(dx, *expected_input_grad(g, w, for_input))
    dw = kernels.weight_grad(g, x, for_weight, WINDOW, implementation="native")
    assert_agrees(dw, *expected_weight_grad(g, x, for_weight))


def assert_no_worse(got, other) -> None:
    """NaN only where ``other`` is, and infinite only where that is not finite.

    A product of XLA's overflows before the sum does, whose infinity then has the other sign, or
    stands where the sum is finite, or makes NaN of the two, as its compiler happens to contract.
    """
    got, other = np.asarray(got), np.asarray(other)
    assert not np.any(np.isnan(got) & ~np.isnan(other))
    assert not np.any(np.isinf(got) & np.isfinite(other) & (np.abs(other) < 3e38))


@given(products())
@settings(max_examples=10)
def test_products_are_nan_only_where_those_of_xla_are(case):
    g, x, w, (for_input, for_weight) = case

    def both(implementation):
        dx = kernels.input_grad(
            g, w, for_input, WINDOW, (SIZE, SIZE), implementation=implementation
        )
        return dx, kernels.weight_grad(g, x, for_weight, WINDOW, implementation=implementation)

    for got, other in zip(both("native"), jax.jit(both, static_argnums=0)("xla"), strict=True):
        assert_no_worse(got, other)


class Transform:
    """Operands of the transforms, and what NumPy makes of them in float32."""

    def __init__(self, rng, dtype, values):
        self.shape, self.pool = (3, 5, 6, 21), int(rng.choice([1, 2]))
        source = spiked(rng, self.shape, values)
        if dtype != np.float32:
            source = rng.integers(-99, 99, self.shape)
        self.source = source.astype(dtype)
        self.line, self.flow = spiked(rng, (6, 21), values), spiked(rng, (4, 21), values)
        n, h, w, c = self.shape
        self.d = spiked(rng, (n, h // self.pool, w // self.pool, c), values)

    def is_up(self):
        return self.line[0] * self.source.astype(np.float32) + self.line[1] >= 0

    def windows(self, a):
        """``[N, H', W', C, pool^2]``"""
        n, h, w, c = self.shape
        p = self.pool
        a = a[:, : h - h % p, : w - w % p].reshape(n, h // p, p, w // p, p, c)
        return a.transpose(0, 1, 3, 5, 2, 4).reshape(n, h // p, w // p, c, p * p)

    def before_pooling(self):
        _, _, p1, q1, p0, q0 = self.line
        source = self.source.astype(np.float32)
        return np.where(self.is_up(), p1 * source + q1, p0 * source + q0)

    def t(self):
        return self.windows(self.before_pooling()).max(-1)

    def spread(self):
        """``d`` before pooling: to the first that attains the maximum, or to the last NaN."""
        n, h, w, c = self.shape
        p = self.pool
        t = self.windows(self.before_pooling())
        last_nan = p * p - 1 - np.isnan(t)[..., ::-1].argmax(-1)
        place = np.where(np.isnan(t).any(-1), last_nan, t.argmax(-1))
        parts = np.where(np.arange(p * p) == place[..., None], self.d[..., None], np.float32(0))
        parts = parts.reshape(n, h // p, w // p, c, p, p).transpose(0, 1, 4, 2, 5, 3)
        full = np.zeros(self.shape, np.float32)
        full[:, : h - h % p, : w - w % p] = parts.reshape(n, h // p * p, w // p * p, c)
        return full

    def gradient(self):
        _, _, p1, _, p0, _ = self.line
        h1, k1, h0, k0 = self.flow
        source, d = self.source.astype(np.float32), self.spread()
        return np.where(
            self.is_up(), p1 * d + (h1 * source + k1), p0 * d + (h0 * source + k0)
        ).astype(np.float32)

    @property
    def operands(self):
        return jnp.asarray(self.source), Line(*jnp.asarray(self.line)), self.pool


@st.composite
def transform_cases(draw):
    dtype = draw(st.sampled_from([np.float32, np.int16]))
    return Transform(np.random.default_rng(draw(SEEDS)), dtype, draw(KINDS))


@given(transform_cases())
def test_transforms_forward(case):
    t = case.t()
    np.testing.assert_array_equal(transforms.activate(*case.operands), t)
    signs, clip, nan = transforms.encode(*case.operands)
    np.testing.assert_array_equal(signs.unpack(), t >= 0)
    np.testing.assert_array_equal(clip.unpack(), np.abs(t) <= 1)
    np.testing.assert_array_equal(np.isnan(nan), np.isnan(t).any((1, 2, 3)))


@given(transform_cases())
def test_transforms_backward(case):
    source, line, pool = case.operands
    g, lo, hi = transforms.gradient(source, line, Flow(*jnp.asarray(case.flow)), pool, case.d, None)
    expected = case.gradient()
    np.testing.assert_array_equal(g, expected)
    np.testing.assert_array_equal(lo, expected.min((1, 2)))
    np.testing.assert_array_equal(hi, expected.max((1, 2)))


@given(transform_cases())
def test_sums_overflow_only_as_a_whole(case):
    source, line, pool = case.operands
    up, s, d = (a.astype(np.float64) for a in (case.is_up(), case.source, case.spread()))
    parts = [np.where(side, part, 0) for side in (up == 1, up == 0) for part in (d, d * s)]
    # Entries that pooling leaves out have no gradient: not even zero times infinity.
    n, h, w, _ = case.shape
    kept = [part[:, : h - h % pool, : w - w % pool] for part in parts]
    expected = np.stack([part.sum((0, 1, 2)) for part in kept])
    size = np.stack([np.abs(part).sum((0, 1, 2)) for part in kept])
    sums = transforms.gradient_sums(source, line, pool, case.d, None)
    assert_agrees(np.stack([sums.q1, sums.p1, sums.q0, sums.p0]), expected, size)
    count = math.prod((n, h, w))
    powers = (np.ones_like(s), s, s * s)
    parts = [np.where(side, part, 0) for side in (up == 1, up == 0) for part in powers]
    expected = np.stack([part.sum((0, 1, 2)) for part in parts]) / count
    size = np.stack([np.abs(part).sum((0, 1, 2)) for part in parts]) / count
    assert_agrees(np.stack(transforms.moments(source, (line.s, line.t))), expected, size)
