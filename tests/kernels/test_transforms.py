"""The kernels for what stands between two products, against NumPy in float64."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqt_jax.kernels import native, transforms
from fqt_jax.kernels.transforms import Flow, Line

pytestmark = pytest.mark.skipif(
    native.unavailable() is not None and shutil.which("c++") is None, reason="no C++ compiler"
)


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
    def is_up(self) -> np.ndarray:
        s, t = self.line[:2].astype(np.float64)
        return s * self.source + t >= 0

    def before_pooling(self) -> np.ndarray:
        _, _, p1, q1, p0, q0 = self.line.astype(np.float64)
        source = self.source.astype(np.float64)
        return np.where(self.is_up, p1 * source + q1, p0 * source + q0)

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
        source, d = self.source.astype(np.float64), self.spread()
        return np.where(self.is_up, p1 * d + h1 * source + k1, p0 * d + h0 * source + k0)

    def gradient_sums(self) -> np.ndarray:
        source, d, up = self.source.astype(np.float64), self.spread(), self.is_up
        parts = (d * up, d * source * up, d * ~up, d * source * ~up)
        return np.stack([part.sum((0, 1, 2)) for part in parts])

    def moments(self) -> np.ndarray:
        source = self.source.astype(np.float64)
        up = source >= 0
        parts = (source * up, source**2 * up, source * ~up, source**2 * ~up)
        parts = (part * self.weight for part in parts)
        return np.stack([part.mean((0, 1, 2)) for part in parts])

    @property
    def weight(self) -> np.ndarray:
        weights = np.ones(len(self.source)) if self.weights is None else self.weights
        return weights.astype(np.float64).reshape(-1, 1, 1, 1)

    @property
    def operands(self):
        return (
            jnp.asarray(self.source),
            Line(*jnp.asarray(self.line)),
            self.pool,
        )

    @property
    def kept(self):
        return None if self.samples is None else jnp.asarray(self.samples)


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
    pool = draw(st.sampled_from([1, 1, 2, 3]))
    n, c = draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 8, 31, 32, 33, 64]))
    h, w = draw(st.integers(pool, 7)), draw(st.integers(pool, 7))
    dtype = draw(st.sampled_from([np.int16, np.int32, np.float32]))
    keep = draw(st.one_of(st.none(), st.integers(1, n)))
    seed, weighted = draw(st.integers(0, 2**32 - 1)), draw(st.booleans())
    return make_case(seed, (n, h, w, c), dtype, pool, keep, weighted)


@given(cases())
def test_forward_is_exact(case):
    t = case.t()
    np.testing.assert_array_equal(transforms.activate(*case.operands), t)
    signs, clip, nan = transforms.encode(*case.operands)
    np.testing.assert_array_equal(signs.unpack(), t >= 0)
    np.testing.assert_array_equal(clip.unpack(), np.abs(t) <= 1)
    np.testing.assert_array_equal(nan, np.zeros(len(t)))


@given(cases())
def test_backward(case):
    flow = Flow(*jnp.asarray(case.flow))
    source, line, pool = case.operands
    g, lo, hi = transforms.gradient(source, line, flow, pool, case.d, case.kept, case.weights)
    np.testing.assert_array_equal(g, case.gradient())
    np.testing.assert_array_equal(lo, np.asarray(g).min((1, 2)))
    np.testing.assert_array_equal(hi, np.asarray(g).max((1, 2)))
    sums = transforms.gradient_sums(source, line, pool, case.d, case.kept)
    np.testing.assert_array_equal(sums, case.gradient_sums())


@given(cases())
def test_moments(case):
    moments = transforms.moments(jnp.asarray(case.source), case.weights)
    np.testing.assert_allclose(moments, case.moments(), rtol=1e-6, atol=1e-6)


@given(st.integers(1, 600), st.sampled_from([1, 5, 32, 70]), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_weights(rows, o, seed):
    w = np.random.default_rng(seed).standard_normal((rows, o)).astype(np.float32)
    w[0, 0] = -0.0
    signs, scale = transforms.encode_weights(jnp.asarray(w))
    np.testing.assert_array_equal(signs.unpack(), w >= 0)
    np.testing.assert_allclose(scale, np.abs(w.astype(np.float64)).mean(0), rtol=1e-6)


def _everything(case):
    source, line, pool = case.operands
    flow = Flow(*jnp.asarray(case.flow))
    out = (
        transforms.moments(source, case.weights),
        transforms.activate(source, line, pool),
        transforms.encode(source, line, pool),
        transforms.gradient_sums(source, line, pool, case.d, case.kept),
        transforms.gradient(source, line, flow, pool, case.d, case.kept, case.weights),
        transforms.encode_weights(jnp.asarray(case.d).reshape(-1, case.d.shape[3])),
    )
    return [np.asarray(a) for a in jax.tree.leaves(out)]


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


def test_nan_is_seen():
    case = make_case(0, (3, 4, 4, 33), np.float32)
    case.source[1, 2, 3, 7] = np.nan
    _, _, nan = transforms.encode(*case.operands)
    np.testing.assert_array_equal(np.isnan(nan), [False, True, False])
    assert np.isnan(transforms.moments(jnp.asarray(case.source))[:, 7]).any()
    _, scale = transforms.encode_weights(jnp.asarray(case.source[1].reshape(-1, 33)))
    np.testing.assert_array_equal(np.isnan(scale), np.arange(33) == 7)
    case = make_case(0, (3, 4, 4, 33))
    case.flow[:, 5] = np.nan
    source, line, pool = case.operands
    flow = Flow(*jnp.asarray(case.flow))
    _, lo, hi = transforms.gradient(source, line, flow, pool, case.d, None)
    for bound in (lo, hi):
        np.testing.assert_array_equal(np.isnan(bound), np.tile(np.arange(33) == 5, (3, 1)))


NONE = jnp.zeros(0, jnp.float32)
SUMS = jnp.zeros((2, 4, 4, 8), jnp.int16)
SHAPES = {
    "moments": (jax.ShapeDtypeStruct((4, 8), jnp.float32),),
    "activate": (jax.ShapeDtypeStruct((2, 4, 4, 8), jnp.float32),),
}


@pytest.mark.parametrize(
    ("name", "operands", "options", "message"),
    [
        ("moments", (jnp.zeros((2, 4, 8), jnp.int16), NONE), {}, "four axes"),
        ("moments", (jnp.zeros((2, 4, 4, 8), jnp.int8), NONE), {}, "int16, int32 or float32"),
        ("moments", (jnp.zeros((2, 4, 4, 9), jnp.int16), NONE), {}, "wrong shape"),
        ("moments", (jnp.zeros((2, 4, 4, 8), jnp.int16), jnp.zeros(3)), {}, "weights must have"),
        ("activate", (SUMS, jnp.zeros((6, 7)), NONE, NONE), {}, "coefficients"),
        ("activate", (SUMS, jnp.zeros((5, 8)), NONE, NONE), {}, "coefficients"),
        ("activate", (SUMS, jnp.zeros((6, 8)), NONE, NONE), {"pool": np.int64(0)}, "pool"),
        (
            "activate",
            (SUMS, jnp.zeros((6, 8)), NONE, NONE),
            {"pool": np.int64(2)},
            "output has the wrong shape",
        ),
        ("activate", (SUMS, jnp.zeros((6, 8)), jnp.zeros(3), NONE), {}, "offsets must have"),
        (
            "activate",
            (SUMS, jnp.zeros((6, 8)), NONE, jnp.zeros((2, 4, 4, 7))),
            {},
            "what is added",
        ),
    ],
)
def test_bad_operands_are_errors(name, operands, options, message):
    if name == "activate":
        options = {"pool": np.int64(1), **options}
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(native.call(name, SHAPES[name], *operands, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": np.array([1, 3], np.int32)}, "out of range"),
        ({"samples": np.array([1, 1], np.int32)}, "must increase"),
        ({"samples": np.array([1], np.int32)}, "gradient has the wrong shape"),
    ],
)
def test_bad_samples_are_errors(change, message):
    case = dataclasses.replace(make_case(0, (3, 4, 4, 8), keep=2), **change)
    source, line, pool = case.operands
    flow = Flow(*jnp.asarray(case.flow))
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(transforms.gradient_sums(source, line, pool, case.d, case.kept))
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(transforms.gradient(source, line, flow, pool, case.d, case.kept))


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), (3, 3, 5, 7), (1, 1, 600, 16), (9, 33)]),
    clip=st.booleans(),
    seed=st.integers(0, 99),
)
def test_weight_gradients_are_finished_in_place(shape, clip, seed):
    rng = np.random.default_rng(seed)
    w, dw = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    w.flat[0] = rng.choice([0.0, 1.0, -1.0])
    d_scale = rng.normal(size=shape[-1]).astype(np.float32)
    got = jax.jit(transforms.finish_weight_grad, static_argnames="clip")(dw, w, d_scale, clip=clip)
    kept = np.abs(w) <= 1 if clip else np.ones_like(w)
    np.testing.assert_array_equal(got, dw * kept + np.sign(w) * d_scale)


def test_finishing_checks_shapes():
    w = jnp.zeros((3, 4))
    for operands, message in [
        ((w, w, jnp.zeros(3)), "scale's gradient"),
        ((w, jnp.zeros((4, 3)), jnp.zeros(3)), "not the shape of w"),
    ]:
        out = jax.ShapeDtypeStruct(operands[0].shape, jnp.float32)
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(
                native.call("finish_weight_grad", out, *operands, in_place={0: 0}, clips=True)
            )
