"""What stands between two products, by every implementation, against NumPy in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqt_jax.kernels import Flow, Line, native, transforms
from tests.kernels import operations

each = pytest.mark.parametrize(
    "implementation", operations.each_of("moments", "encode", "gradient", "encode_weights")
)
TINY = np.finfo(np.float32).tiny


@dataclasses.dataclass
class Case:
    source: np.ndarray
    line: np.ndarray  # [6, C]
    flow: np.ndarray  # [4, C]
    pool: int
    d: np.ndarray  # [kept, H // pool, W // pool, C]
    samples: np.ndarray | None
    weights: np.ndarray | None  # [N], of the moments

    @property
    def wide(self) -> np.ndarray:
        return self.source.astype(np.float64)

    @property
    def is_up(self) -> np.ndarray:
        s, t = self.line[:2].astype(np.float64)
        return s * self.wide + t >= 0

    def before_pooling(self) -> np.ndarray:
        _, _, p1, q1, p0, q0 = self.line.astype(np.float64)
        return np.where(self.is_up, p1 * self.wide + q1, p0 * self.wide + q0)

    def windows(self, a: np.ndarray) -> np.ndarray:
        """``[N, H', W', C, pool^2]``"""
        n, h, w, c = a.shape
        p = self.pool
        a = a[:, : h - h % p, : w - w % p].reshape(n, h // p, p, w // p, p, c)
        return a.transpose(0, 1, 3, 5, 2, 4).reshape(n, h // p, w // p, c, p * p)

    def t(self) -> np.ndarray:
        return self.windows(self.before_pooling()).max(-1)

    def spread(self) -> np.ndarray:
        """The gradient of ``t``, before pooling, of all samples."""
        n, h, w, c = self.source.shape
        p = self.pool
        t = self.windows(self.before_pooling())
        d = np.zeros(t.shape[:-1])
        d[slice(None) if self.samples is None else self.samples] = self.d
        parts = (np.arange(p * p) == t.argmax(-1)[..., None]) * d[..., None]
        parts = parts.reshape(n, h // p, w // p, c, p, p).transpose(0, 1, 4, 2, 5, 3)
        full = np.zeros((n, h, w, c))
        full[:, : h - h % p, : w - w % p] = parts.reshape(n, h // p * p, w // p * p, c)
        return full

    def gradient(self) -> np.ndarray:
        _, _, p1, _, p0, _ = self.line.astype(np.float64)
        h1, k1, h0, k0 = self.flow.astype(np.float64)[:, None, None, None] * self.weight
        d = self.spread()
        return np.where(self.is_up, p1 * d + h1 * self.wide + k1, p0 * d + h0 * self.wide + k0)

    def gradient_sums(self) -> Line:
        d, up = self.spread(), self.is_up
        no = np.zeros(self.source.shape[3])
        q1, p1, q0, p0 = (
            part.sum((0, 1, 2))
            for part in (d * up, d * self.wide * up, d * ~up, d * self.wide * ~up)
        )
        return Line(no, no, p1=p1, q1=q1, p0=p0, q0=q0)

    def moments(self) -> list[np.ndarray]:
        rows = [row * self.weight for row in (np.ones_like(self.wide), self.wide, self.wide**2)]
        sides = (self.is_up, ~self.is_up)
        return [np.where(side, row, 0).mean((0, 1, 2)) for side in sides for row in rows]

    @property
    def weight(self) -> np.ndarray:
        weights = np.ones(len(self.source)) if self.weights is None else self.weights
        return weights.astype(np.float64).reshape(-1, 1, 1, 1)

    @property
    def operands(self) -> tuple[Any, Line, int]:
        return jnp.asarray(self.source), Line(*jnp.asarray(self.line)), self.pool

    @property
    def backward(self) -> dict[str, Any]:
        samples = None if self.samples is None else jnp.asarray(self.samples)
        return {"d": jnp.asarray(self.d), "samples": samples}


# A program is compiled for each of these: odd sizes, rests of pooling, single entries, all widths
# of a vector, no samples and none kept.
PROGRAMS = {
    "one entry": ((1, 1, 1, 1), np.int16, 1, None, False),
    "rests": ((3, 5, 7, 33), np.int16, 2, 2, True),
    "pool 3": ((2, 7, 6, 64), np.int32, 3, None, False),
    "floats": ((4, 2, 3, 31), np.float32, 1, 1, True),
    "pooled floats": ((2, 4, 4, 32), np.float32, 2, None, True),
    "dense": ((5, 1, 1, 70), np.int16, 1, 3, False),
    "one window": ((3, 4, 5, 8), np.float32, 4, 2, False),
    "no samples": ((0, 4, 4, 8), np.int16, 2, None, True),
    "none kept": ((3, 4, 4, 8), np.int32, 2, 0, False),
}


def make_case(seed, shape, dtype=np.int16, pool=1, keep=None, weighted=False) -> Case:
    """Coefficients are small multiples of 1/4, so that float32 is exact and no entry is close to
    an edge without lying on it."""
    rng = np.random.default_rng(seed)
    n, h, w, c = shape
    source = rng.integers(-40, 40, shape)
    source = source.astype(dtype) if dtype != np.float32 else (source / 4).astype(dtype)

    def quarters(rows):
        return (rng.integers(-8, 9, (rows, c)) / 4).astype(np.float32)

    samples = None
    if keep is not None:
        samples = np.sort(rng.choice(n, keep, replace=False)).astype(np.int32)
    d = rng.integers(-8, 9, (n if keep is None else keep, h // pool, w // pool, c)) / 4
    weights = (rng.integers(0, 9, n) / 4).astype(np.float32) if weighted else None
    return Case(source, quarters(6), quarters(4), pool, d.astype(np.float32), samples, weights)


@st.composite
def cases(draw) -> Case:
    """Each number may be scaled by a power of two, so that float32 stays exact."""
    case = make_case(
        draw(st.integers(0, 2**32 - 1)), *draw(st.sampled_from(list(PROGRAMS.values())))
    )
    power = st.sampled_from([-30, 0, 30])
    of_source = draw(power) if case.source.dtype == np.float32 else 0
    of_kink, of_t, of_d = draw(power), draw(power), draw(power)
    case.source = case.source * case.source.dtype.type(2.0**of_source)
    kink = [of_kink, of_kink + of_source]
    line = [*kink, of_t - of_source, of_t, of_t - of_source, of_t]
    of_g = of_t - of_source + of_d
    flow = [of_g - of_source, of_g] * 2
    case.line *= np.exp2(np.float32(line))[:, None]
    case.flow *= np.exp2(np.float32(flow))[:, None]
    case.d *= np.float32(2.0**of_d)
    return case


@each
@given(case=cases())
def test_forward_is_exact(implementation, case):
    t = case.t()
    np.testing.assert_array_equal(
        transforms.activate(*case.operands, implementation=implementation), t
    )
    signs, clip, nan = transforms.encode(*case.operands, implementation=implementation)
    np.testing.assert_array_equal(signs.unpack(), t >= 0)
    np.testing.assert_array_equal(clip.unpack(), np.abs(t) <= 1)
    np.testing.assert_array_equal(nan, np.zeros(len(t)))


@each
@given(case=cases(), overwrites=st.booleans())
def test_backward_is_exact(implementation, case, overwrites):
    source, line, pool = case.operands
    g, lo, hi = transforms.gradient(
        source,
        line,
        Flow(*jnp.asarray(case.flow)),
        pool,
        **case.backward,
        weights=None if case.weights is None else jnp.asarray(case.weights),
        overwrites=overwrites,
        implementation=implementation,
    )
    np.testing.assert_array_equal(g, case.gradient())
    np.testing.assert_array_equal(lo, np.asarray(g).min((1, 2)))
    np.testing.assert_array_equal(hi, np.asarray(g).max((1, 2)))
    sums = transforms.gradient_sums(
        source, line, pool, **case.backward, implementation=implementation
    )
    for name, got, expected in zip(Line._fields, sums, case.gradient_sums(), strict=True):
        np.testing.assert_array_equal(got, expected, err_msg=name)


def moments_of(case: Case, implementation: str | None) -> transforms.Moments:
    source, line, _ = case.operands
    weights = None if case.weights is None else jnp.asarray(case.weights)
    return transforms.moments(source, (line.s, line.t), weights, implementation=implementation)


@each
@given(case=cases().filter(lambda case: len(case.source)))
def test_moments(implementation, case):
    moments = moments_of(case, implementation)
    for name, got, expected in zip(moments._fields, moments, case.moments(), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * scale, err_msg=name)


@each
@pytest.mark.parametrize("shape", [(0, 4, 4, 8), (2, 4, 4, 0)])
def test_moments_of_nothing_are_zero(implementation, shape):
    for row in moments_of(make_case(0, shape), implementation):
        np.testing.assert_array_equal(row, np.zeros(shape[3]))


@each
@pytest.mark.parametrize("shape", [(0, 3), (3, 3, 2, 0), (0,)])
def test_weights_of_nothing(implementation, shape):
    signs, scale = transforms.encode_weights(jnp.zeros(shape), implementation=implementation)
    assert signs.words.shape == (0,)
    np.testing.assert_array_equal(scale, np.zeros(shape[-1]))


@each
def test_moments_of_many_entries_keep_their_digits(implementation):
    """The mean is large beside the deviation, and each sample has many entries."""
    rng = np.random.default_rng(0)
    case = make_case(0, (64, 32, 32, 2), np.float32)
    case.source = (100 + rng.normal(size=case.source.shape)).astype(np.float32)
    case.line[:2] = [[1, -1], [-100, 100]]
    for got, expected in zip(moments_of(case, implementation), case.moments(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-6)


def case_at_the_kink() -> Case:
    """What lies on a kink is above it, unless that is moved by the least normal number."""
    case = make_case(0, (1, 1, 3, 4))
    case.source[...] = np.array([-1, 0, 1]).reshape(1, 1, 3, 1)
    case.line[0], case.line[1] = [0, 1, 1, -1], [0, 0, -TINY, -TINY]
    case.line[2:] = np.array([1, 10, 0, 20]).reshape(4, 1)
    return case


@each
def test_the_kink_itself(implementation):
    case = case_at_the_kink()
    expected = np.array([[9, 10, 11], [20, 10, 11], [20, 20, 11], [9, 20, 20]]).T
    got = transforms.activate(*case.operands, implementation=implementation)
    np.testing.assert_array_equal(got[0, 0], expected)
    np.testing.assert_array_equal(case.t()[0, 0], expected)


@each
def test_moments_at_the_kink(implementation):
    moments = moments_of(case_at_the_kink(), implementation)
    np.testing.assert_allclose(moments.share1, np.array([3, 2, 1, 1]) / 3, rtol=1e-6)
    np.testing.assert_allclose(moments.share0, np.array([0, 1, 2, 2]) / 3, rtol=1e-6)


@each
def test_the_first_of_equal_entries_gets_the_gradient(implementation):
    case = make_case(0, (2, 4, 6, 33), pool=2)
    case.source[...] = 3
    sums = transforms.gradient(
        *case.operands[:2],
        Flow(*jnp.zeros((4, 33))),
        2,
        **case.backward,
        implementation=implementation,
    )
    np.testing.assert_array_equal(sums[0][:, 1::2], 0)
    np.testing.assert_array_equal(sums[0][:, :, 1::2], 0)
    slope = np.where(case.is_up, case.line[2], case.line[4])
    np.testing.assert_array_equal(sums[0][:, ::2, ::2], slope[:, ::2, ::2] * case.d)


@each
def test_offsets_and_additions(implementation):
    case = make_case(3, (3, 5, 4, 7), pool=2)
    rng = np.random.default_rng(0)
    offsets = rng.integers(-8, 9, 3).astype(np.float32)
    added = rng.integers(-8, 9, (3, 2, 2, 7)).astype(np.float32)
    to = {"implementation": implementation}
    of_sample = offsets.reshape(-1, 1, 1, 1)
    got = transforms.activate(*case.operands, jnp.asarray(offsets), jnp.asarray(added), **to)
    np.testing.assert_array_equal(got, case.t() + of_sample + added)
    got = transforms.activate(*case.operands, jnp.asarray(offsets), **to)
    np.testing.assert_array_equal(got, case.t() + of_sample)
    got = transforms.activate(*case.operands, added=jnp.asarray(added), **to)
    np.testing.assert_array_equal(got, case.t() + added)


SPECIALS = np.array([np.nan, np.inf, -np.inf, -0.0, 3e38], np.float32)


@each
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_goes_on(implementation, pool):
    case = make_case(1, (6, 4, 4, 33), np.float32, pool)
    case.source[np.arange(5), 2, 1, 7 * np.arange(5)] = SPECIALS
    case.line[:, 7] = [1, 0, 1, 0.5, 0, 0.5]
    with np.errstate(over="ignore"):
        t = case.t().astype(np.float32)
    got = transforms.activate(*case.operands, implementation=implementation)
    np.testing.assert_array_equal(got, t)
    signs, clip, nan = transforms.encode(*case.operands, implementation=implementation)
    np.testing.assert_array_equal(signs.unpack(), t >= 0)
    np.testing.assert_array_equal(clip.unpack(), np.abs(t) <= 1)
    np.testing.assert_array_equal(np.isnan(nan), np.isnan(t).any((1, 2, 3)))
    np.testing.assert_array_equal(np.nan_to_num(nan), 0)


@each
def test_moments_show_nan_in_its_channel(implementation):
    case = make_case(1, (6, 4, 4, 33), np.float32)
    case.source[3, 2, 1, 7] = np.nan
    poisoned = np.any([np.isnan(m) for m in moments_of(case, implementation)], 0)
    np.testing.assert_array_equal(poisoned, np.arange(33) == 7)


@each
def test_nan_in_the_flow_reaches_the_bounds(implementation):
    case = make_case(0, (3, 4, 4, 33))
    case.flow[:, 5] = np.nan
    source, line, pool = case.operands
    flow = Flow(*jnp.asarray(case.flow))
    _, lo, hi = transforms.gradient(
        source, line, flow, pool, **case.backward, implementation=implementation
    )
    for bound in (lo, hi):
        np.testing.assert_array_equal(np.isnan(bound), np.tile(np.arange(33) == 5, (3, 1)))


@each
@pytest.mark.parametrize("shape", [(1, 1), (600, 5), (1, 3, 11, 70), (3, 3, 2, 32), (9,)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_weights(implementation, shape, scale):
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * np.float32(scale)
    w.flat[0] = -0.0
    signs, mean = transforms.encode_weights(jnp.asarray(w), implementation=implementation)
    np.testing.assert_array_equal(signs.unpack(), w >= 0)
    rows = np.abs(w.astype(np.float64)).reshape(-1, shape[-1])
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-6)


@each
def test_nan_among_the_weights_is_that_of_their_scale(implementation):
    w = np.ones((3, 3, 2, 33), np.float32)
    w[1, 2, 1, 7] = np.nan
    _, scale = transforms.encode_weights(jnp.asarray(w), implementation=implementation)
    np.testing.assert_array_equal(np.isnan(scale), np.arange(33) == 7)


@each
@pytest.mark.parametrize("shape", [(1, 1), (3, 3, 5, 7), (1, 1, 600, 16), (9, 33), (4,)])
@pytest.mark.parametrize("clip", [True, False])
def test_weight_gradients_are_finished(implementation, shape, clip):
    rng = np.random.default_rng(0)
    w, dw = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    for edge in (0.0, 1.0, -1.0, np.nextafter(np.float32(1), np.float32(2))):
        w.flat[rng.integers(w.size)] = edge
    d_scale = rng.normal(size=shape[-1]).astype(np.float32)
    kept = np.abs(w) <= 1 if clip else np.ones_like(w)
    expected = dw * kept + np.sign(w) * d_scale
    if clip:
        dw[np.abs(w) > 1] = np.nan  # what is cut off is not looked at
    got = transforms.finish_weight_grad(
        *map(jnp.asarray, (dw, w, d_scale)), clip=clip, implementation=implementation
    )
    np.testing.assert_array_equal(got, expected)


# What only the C++ kernels have


def _everything(case) -> list[np.ndarray]:
    source, line, pool = case.operands
    weights = jnp.asarray(case.weights)
    flow = Flow(*jnp.asarray(case.flow))
    to = {"implementation": "native"}
    out = (
        moments_of(case, "native"),
        transforms.activate(source, line, pool, **to),
        transforms.encode(source, line, pool, **to),
        transforms.gradient_sums(source, line, pool, **case.backward, **to),
        transforms.gradient(source, line, flow, pool, **case.backward, weights=weights, **to),
        transforms.encode_weights(jnp.asarray(case.d).reshape(-1, case.d.shape[3]), **to),
    )
    return [np.asarray(a) for a in jax.tree.leaves(out)]


@pytest.mark.skipif("native" not in operations.implementations("encode"), reason="no extension")
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
@pytest.mark.parametrize("pool", [1, 2])
def test_instruction_sets_agree_bit_for_bit(dtype, pool):
    from fqt_jax.kernels import _native

    case = make_case(0, (5, 9, 8, 37), dtype, pool, keep=2, weighted=True)
    case.line = case.line + np.random.default_rng(1).standard_normal((6, 37)).astype(np.float32)
    best = _native.current_isa()
    expected = _everything(case)
    try:
        for isa in _native.supported_isas():
            _native.select_isa(isa)
            for a, b in zip(_everything(case), expected, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=isa)
    finally:
        _native.select_isa(best)


@pytest.mark.skipif(native.unavailable() is not None, reason="no extension")
@pytest.mark.parametrize(
    ("samples", "message"), [([1, 3], "out of range"), ([1, 1], "must increase")]
)
def test_samples_that_cannot_be_are_errors(samples, message):
    """Only the kernels see values; XLA leaves out what is out of range."""
    case = make_case(0, (3, 4, 4, 8), keep=2)
    case.samples = np.array(samples, np.int32)
    source, line, pool = case.operands
    flow = Flow(*jnp.asarray(case.flow))
    to = {**case.backward, "implementation": "native"}
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(transforms.gradient_sums(source, line, pool, **to))
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(transforms.gradient(source, line, flow, pool, **to))


# What is refused

S = jnp.zeros((2, 4, 4, 8), jnp.int16)
ROW = jnp.zeros(8)
LINE, FLOW = Line(*[ROW] * 6), Flow(*[ROW] * 4)
SHORT = LINE._replace(q0=jnp.zeros(7))
D = jnp.zeros((2, 4, 4, 8))
KEPT = jnp.zeros(1, jnp.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: transforms.moments(S[0], (ROW, ROW)), r"\[N, H, W, C\]; got the shape \(4, 4, 8"),
        (lambda: transforms.moments(S.astype(jnp.int8), (ROW, ROW)), "int16, int32 or float32"),
        (
            lambda: transforms.moments(S, (ROW, ROW[:1])),
            r"T must be float32\[8\]; got",
        ),
        (lambda: transforms.moments(S, (ROW, ROW), ROW[:3]), r"weights must be float32\[2\]"),
        (lambda: transforms.encode(S, SHORT, 1), r"q0 must be float32\[8\]; got float32\[7\]"),
        (lambda: transforms.encode(S, LINE, 0), r"pool must be from 1 to .* \(4, 4\); got 0"),
        (lambda: transforms.activate(S, LINE, 5), "pool must be from 1 to"),
        (lambda: transforms.activate(S, SHORT, 1), "q0 must be"),
        (lambda: transforms.activate(S, LINE, 1, ROW), r"offsets must be float32\[2\]"),
        (lambda: transforms.activate(S, LINE, 2, None, D), r"added must be float32\[2, 2, 2, 8\]"),
        (lambda: transforms.gradient_sums(S, LINE, 2, D, None), r"d must be float32\[2, 2, 2, 8\]"),
        (lambda: transforms.gradient_sums(S, LINE, 1, D, KEPT), r"d must be float32\[1, 4, 4, 8\]"),
        (
            lambda: transforms.gradient_sums(S, LINE, 1, D, ROW),
            "at most 2 indices, int32; got float32",
        ),
        (lambda: transforms.gradient(S, SHORT, FLOW, 1, D, None), "q0 must be"),
        (lambda: transforms.gradient(S, LINE, FLOW, 1, D, KEPT), "d must be"),
        (lambda: transforms.gradient(S, LINE, Flow(*[ROW[1:]] * 4), 1, D, None), "h1 must be"),
        (lambda: transforms.gradient(S, LINE, FLOW, 1, D, None, ROW), "weights must be"),
        (lambda: transforms.encode_weights(S), r"w must be float32\[2, 4, 4, 8\]; got int16"),
        (lambda: transforms.encode_weights(jnp.float32(1)), "an axis of output channels"),
        (
            lambda: transforms.finish_weight_grad(D, D[0], ROW, clip=True),
            r"dw must be float32\[4, 4, 8\]",
        ),
        (lambda: transforms.finish_weight_grad(D, D, ROW[1:], clip=True), "d_scale must be"),
    ],
)
def test_operands_that_do_not_fit(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
