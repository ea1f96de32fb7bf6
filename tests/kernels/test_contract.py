"""One suite for every implementation of the integer products that is available here."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqt_jax import PackedBits, Selection, kernels
from fqt_jax.kernels import Rounding, UnsupportedError, Window
from tests import reference

AVAILABLE = [name for name, state in kernels.implementations().items() if state == "available"]
each = pytest.mark.parametrize("implementation", AVAILABLE)
each_fast = pytest.mark.parametrize(
    "implementation",
    # Words of bits on accelerators: compiled for each shape, and slowly.
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "packed")) for name in AVAILABLE],
)
SEED = np.array([0x1234ABCD, 0x0F1E2D3C], np.uint32)

_forward = jax.jit(kernels.forward, static_argnames=("window", "implementation"))
_input_grad = jax.jit(
    kernels.input_grad, static_argnames=("window", "input_size", "compact", "implementation")
)
_weight_grad = jax.jit(kernels.weight_grad, static_argnames=("window", "implementation"))


@dataclasses.dataclass
class Case:
    """One convolution: signs, output gradient, window."""

    x: np.ndarray
    w: np.ndarray
    g: np.ndarray
    window: Window

    @property
    def input_size(self) -> tuple[int, int]:
        return self.x.shape[1], self.x.shape[2]

    @property
    def geometry(self):
        return self.window.strides, self.window.padding

    @property
    def packed(self) -> tuple[PackedBits, PackedBits]:
        return PackedBits.pack(self.x > 0), PackedBits.pack(self.w > 0, batch_ndim=0)

    def forward(self, implementation) -> np.ndarray:
        x, w = self.packed
        return np.asarray(_forward(x, w, window=self.window, implementation=implementation))

    def input_grad(self, rounding, implementation, **options) -> np.ndarray:
        args = (self.g, self.packed[1], rounding)
        options.update(window=self.window, input_size=self.input_size)
        run = _input_grad(*args, implementation=implementation, **options)
        assert run.dtype == jnp.float32
        return np.asarray(run)

    def weight_grad(self, rounding, implementation) -> np.ndarray:
        args = (self.g, self.packed[0], rounding)
        run = _weight_grad(*args, window=self.window, implementation=implementation)
        assert run.dtype == jnp.float32
        return np.asarray(run)

    def input_grad_of(self, g: np.ndarray) -> np.ndarray:
        return reference.conv_input_grad(g, self.w, *self.geometry, self.input_size)

    def weight_grad_of(self, g: np.ndarray) -> np.ndarray:
        return reference.conv_weight_grad(self.x, g, self.w.shape[:2], *self.geometry)


def make_case(seed, n, size, c, o, kernel=(1, 1), strides=(1, 1), padding=((0, 0), (0, 0))) -> Case:
    rng = np.random.default_rng(seed)
    window = Window(kernel, strides, padding)
    x = rng.choice([-1, 1], size=(n, *size, c))
    w = rng.choice([-1, 1], size=(*kernel, c, o))
    g = rng.normal(size=(n, *window.output_size(size), o)).astype(np.float32)
    return Case(x, w, g, window)


CASES = {
    "dense": {"n": 5, "size": (1, 1), "c": 37, "o": 6},
    "one of each": {"n": 1, "size": (1, 1), "c": 1, "o": 1},
    "pointwise": {"n": 3, "size": (4, 3), "c": 5, "o": 4},
    "same": {"n": 3, "size": (5, 5), "c": 3, "o": 4, "kernel": (3, 3), "padding": ((1, 1),) * 2},
    "whole words": {"n": 2, "size": (4, 4), "c": 32, "o": 32, "kernel": (3, 3)},
    "strided": {
        "n": 4,
        "size": (6, 5),
        "c": 2,
        "o": 3,
        "kernel": (3, 2),
        "strides": (2, 3),
        "padding": ((0, 1), (1, 0)),
    },
    "gaps": {"n": 2, "size": (7, 7), "c": 2, "o": 2, "kernel": (2, 1), "strides": (3, 3)},
    "wide padding": {
        "n": 2,
        "size": (2, 3),
        "c": 1,
        "o": 3,
        "kernel": (2, 2),
        "padding": ((3, 2),) * 2,
    },
}


def named_case(name: str) -> Case:
    return make_case(len(name), **CASES[name])


@st.composite
def drawn_cases(draw) -> Case:
    kernel, strides, size, padding = [], [], [], []
    mode = draw(st.sampled_from(["SAME", "VALID", "explicit"]))
    for _ in range(2):
        k, s = draw(st.integers(1, 5)), draw(st.integers(1, 3))
        n = draw(st.integers(1, 7))
        pads = {"SAME": (0, 0), "VALID": (0, 0), "explicit": None}[mode]
        pads = pads or (draw(st.integers(0, k)), draw(st.integers(0, k)))
        kernel.append(k)
        strides.append(s)
        size.append(n if mode == "SAME" else max(n, k - sum(pads)))
        padding.append(pads)
    if mode == "SAME":
        padding = reference.same_padding(size, kernel, strides)
    return make_case(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(1, 4)),
        tuple(size),
        draw(st.sampled_from([1, 2, 3, 8, 17, 33])),
        draw(st.sampled_from([1, 2, 5, 16])),
        tuple(kernel),
        tuple(strides),
        tuple(padding),
    )


def selection(indices, weights, size) -> Selection:
    return Selection(jnp.array(indices, jnp.int32), jnp.array(weights, jnp.float32), size)


def integer_rounding(g, bits, groups, samples=None, channels=None) -> Rounding:
    """Zero point 0 and step 1, so that the quantized gradient is the code."""
    kept = {"samples": samples, "channels": channels}[groups]
    size = g.shape[0 if groups == "samples" else 3] if kept is None else kept.indices.shape[0]
    lo, value_range = np.zeros(size, np.float32), np.full(size, 2**bits - 1, np.float32)
    return Rounding(lo, value_range, SEED, samples, channels, bits, groups)


def true_rounding(g, bits, groups, samples=None, channels=None) -> Rounding:
    """Zero points and ranges of ``g`` as they are, folded weights included."""
    values = np.asarray(g, np.float32)
    if samples is not None:
        values = values[np.asarray(samples.indices)]
    if channels is not None:
        values = values[..., np.asarray(channels.indices)]
    if groups == "channels" and samples is not None:
        weights = np.asarray(samples.weights)
        values = (values * weights.reshape(-1, 1, 1, 1))[weights != 0]
    reduced = (1, 2, 3) if groups == "samples" else (0, 1, 2)
    lo = values.min(axis=reduced)
    value_range = np.maximum(values.max(axis=reduced) - lo, np.float32(2.0**-100))
    return Rounding(lo, value_range, SEED, samples, channels, bits, groups)


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    scale = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * scale)


def assert_close_or_declined(run, rounding, implementation, expected) -> None:
    """For the two cases that only the reference must serve."""
    try:
        got = run(rounding, implementation)
    except UnsupportedError:
        if implementation == "xla":
            raise
        return
    assert_close(got, expected)


def unit(indices, size) -> Selection:
    return selection(indices, np.ones(len(indices)), size)


# Exact integers


@each_fast
@settings(max_examples=12)
@given(case=drawn_cases())
def test_forward_is_exact(implementation, case):
    z = case.forward(implementation)
    assert z.dtype == np.int16
    np.testing.assert_array_equal(z, reference.conv(case.x, case.w, *case.geometry))


@each_fast
@settings(max_examples=8)
@given(case=drawn_cases(), bits=st.integers(1, 8))
def test_gradient_codes_and_sums_are_exact(implementation, case, bits):
    case.g = case.g * np.float32(0.7 * (2**bits - 1))  # some below and some above the levels
    rounding = integer_rounding(case.g, bits, "samples")
    codes, _ = reference.quantized(case.g, rounding)
    np.testing.assert_array_equal(
        case.input_grad(rounding, implementation), case.input_grad_of(codes)
    )
    rounding = integer_rounding(case.g, bits, "channels")
    codes, _ = reference.quantized(case.g, rounding)
    np.testing.assert_array_equal(
        case.weight_grad(rounding, implementation), case.weight_grad_of(codes)
    )


@each
@pytest.mark.parametrize("name", CASES)
def test_forward_of_the_named_cases(implementation, name):
    case = named_case(name)
    np.testing.assert_array_equal(
        case.forward(implementation), reference.conv(case.x, case.w, *case.geometry)
    )


@each
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bits", [1, 4])
def test_kept_groups_keep_their_own_codes(implementation, name, bits):
    """The counter of an entry is its place in all of ``g``, whatever else is kept."""
    case = named_case(name)
    n, o = case.g.shape[0], case.g.shape[3]
    samples, channels = unit(range(n // 2, n), n), unit(range(0, o, 2), o)
    case.g = case.g * np.float32(2**bits - 1)
    rounding = integer_rounding(case.g, bits, "samples", samples)
    codes, _ = reference.quantized(case.g, rounding)
    np.testing.assert_array_equal(
        case.input_grad(rounding, implementation), case.input_grad_of(codes)
    )
    rounding = integer_rounding(case.g, bits, "channels", samples, channels)
    codes, _ = reference.quantized(case.g, rounding)
    np.testing.assert_array_equal(
        case.weight_grad(rounding, implementation), case.weight_grad_of(codes)
    )


@each
@pytest.mark.parametrize("name", ["whole words", "strided", "dense"])
def test_masked_and_compact_input_gradients(implementation, name):
    case = named_case(name)
    n = case.g.shape[0]
    full = case.input_grad(integer_rounding(case.g, 4, "samples", None), implementation)
    bits = np.random.default_rng(1).integers(0, 2, case.x.shape).astype(bool)
    mask = PackedBits.pack(jnp.asarray(bits))
    rounding = integer_rounding(case.g, 4, "samples", None)
    np.testing.assert_array_equal(
        case.input_grad(rounding, implementation, mask=mask), np.where(bits, full, 0)
    )
    kept = list(range(n // 2, n))
    rounding = integer_rounding(case.g, 4, "samples", unit(kept, n))
    np.testing.assert_array_equal(
        case.input_grad(rounding, implementation, compact=True), full[kept]
    )
    np.testing.assert_array_equal(
        case.input_grad(rounding, implementation, mask=mask, compact=True),
        np.where(bits, full, 0)[kept],
    )
    if implementation == "xla":
        g = case.input_grad_of(case.g.astype(np.float64))
        assert_close(case.input_grad(None, implementation, mask=mask), np.where(bits, g, 0))


@each
@pytest.mark.parametrize(("c", "dtype"), [(2**15 - 1, np.int16), (2**15, np.int32)])
def test_type_of_the_sums(implementation, c, dtype):
    ones = np.ones((1, 1, 1, c), np.int64)
    w = np.stack([np.ones(c), -np.ones(c)], axis=1).astype(np.int64).reshape(1, 1, c, 2)
    z = Case(ones, w, np.zeros((1, 1, 1, 2)), Window()).forward(implementation)
    assert z.dtype == dtype
    np.testing.assert_array_equal(z.ravel(), [c, -c])


@each
@pytest.mark.parametrize("of", ["samples", "positions"])
def test_weight_sums_beyond_the_exact_range_of_float32(implementation, of):
    """Running sums reach 1.8e7 > 2^24 before they cancel to a small odd number."""
    half = 70_001
    shape = (2 * half, 1, 1, 1) if of == "samples" else (1, 2, half, 1)
    x = np.concatenate([np.ones(half), -np.ones(half)]).astype(np.int64)
    case = Case(x.reshape(shape), np.ones((1, 1, 1, 1), np.int64), None, Window())
    case.g = np.full(shape, 255, np.float32)
    case.g.flat[-2:] = 254
    rounding = integer_rounding(case.g, 8, "channels")
    codes, _ = reference.quantized(case.g, rounding)
    assert np.cumsum(x * codes.ravel()).max() > 2**24
    expected = case.weight_grad_of(codes)
    assert expected.item() in (0, 1, 2)
    np.testing.assert_array_equal(case.weight_grad(rounding, implementation), expected)


@each
def test_input_sums_beyond_the_exact_range_of_float32(implementation):
    half = 66_001
    w = np.concatenate([np.ones(half), -np.ones(half)]).astype(np.int64).reshape(1, 1, 1, -1)
    case = Case(np.ones((1, 1, 1, 1), np.int64), w, None, Window())
    case.g = np.full((1, 1, 1, 2 * half), 255, np.float32)
    case.g[..., -3:] = 254
    rounding = integer_rounding(case.g, 8, "samples")
    codes, _ = reference.quantized(case.g, rounding)
    assert np.cumsum(w.ravel() * codes.ravel()).max() > 2**24
    np.testing.assert_array_equal(
        case.input_grad(rounding, implementation), case.input_grad_of(codes)
    )


# Real scales, weights and selections


def roundings_for_input(case: Case, bits: int) -> list[Rounding]:
    n = case.g.shape[0]
    kept = selection(range(n), [0.0 if i % 2 else 2.5 for i in range(n)], n)
    some = selection(range(n // 2, n), [1.0 + i for i in range(n - n // 2)], n)
    return [true_rounding(case.g, bits, "samples", samples) for samples in (None, kept, some)]


def roundings_for_weight(case: Case, bits: int) -> list[Rounding]:
    n, o = case.g.shape[0], case.g.shape[3]
    folded = selection(range(n // 2, n), [1.3 + i for i in range(n - n // 2)], n)
    holes = selection(range(n), [0.0 if i % 2 else 3.7 for i in range(n)], n)
    channels = selection(range(0, o, 2), [1.5 + i for i in range(0, o, 2)], o)
    dropped = selection(range(o), [0.0 if i % 2 else 2.0 for i in range(o)], o)
    pairs = [
        (None, None),
        (folded, None),
        (holes, None),
        (None, channels),
        (None, dropped),
        (folded, channels),
        (holes, dropped),
    ]
    return [true_rounding(case.g, bits, "channels", *pair) for pair in pairs]


@each
@pytest.mark.parametrize("name", CASES)
def test_input_gradient(implementation, name):
    case = named_case(name)
    for bits, rounding in zip((1, 4, 8), roundings_for_input(case, 4), strict=True):
        rounding = dataclasses.replace(rounding, bits=bits)
        _, g = reference.quantized(case.g, rounding)
        assert_close(case.input_grad(rounding, implementation), case.input_grad_of(g))


@each
@pytest.mark.parametrize("name", CASES)
def test_weight_gradient(implementation, name):
    case = named_case(name)
    roundings = roundings_for_weight(case, 4)
    if name not in ("dense", "strided"):  # folded weights, and empty slots on both axes
        roundings = [roundings[1], roundings[-1]]
    for rounding in roundings:
        _, g = reference.quantized(case.g, rounding)
        assert_close(case.weight_grad(rounding, implementation), case.weight_grad_of(g))


@each
@pytest.mark.parametrize("name", ["one of each", "strided"])
@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e20])
def test_scales(implementation, name, scale):
    """From below the least range to far above one; groups of one entry have no range at all."""
    case = named_case(name)
    case.g = case.g * np.float32(scale)
    rounding = true_rounding(case.g, 1, "samples")
    _, g = reference.quantized(case.g, rounding)
    assert_close(case.input_grad(rounding, implementation), case.input_grad_of(g))
    rounding = true_rounding(case.g, 4, "channels")
    _, g = reference.quantized(case.g, rounding)
    assert_close(case.weight_grad(rounding, implementation), case.weight_grad_of(g))


@each
@pytest.mark.parametrize("name", ["dense", "same", "strided"])
def test_gradients_without_rounding(implementation, name):
    case = named_case(name)
    g = case.g.astype(np.float64)
    assert_close_or_declined(case.input_grad, None, implementation, case.input_grad_of(g))
    assert_close_or_declined(case.weight_grad, None, implementation, case.weight_grad_of(g))


@each
@pytest.mark.parametrize("name", ["dense", "same", "strided"])
def test_weight_gradient_of_sample_groups(implementation, name):
    case = named_case(name)
    for rounding in roundings_for_input(case, 4):
        _, g = reference.quantized(case.g, rounding)
        expected = case.weight_grad_of(g)
        assert_close_or_declined(case.weight_grad, rounding, implementation, expected)


def test_automatic_choice_serves_everything():
    case = named_case("same")
    expected = case.weight_grad_of(case.g.astype(np.float64))
    assert_close(case.weight_grad(None, None), expected)
    assert_close(case.input_grad(None, None), case.input_grad_of(case.g.astype(np.float64)))
    rounding = true_rounding(case.g, 1, "samples")
    _, g = reference.quantized(case.g, rounding)
    assert_close(case.weight_grad(rounding, None), case.weight_grad_of(g))


# Dropped slots and NaN


@each
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_dropped_row_is_not_even_looked_at(implementation, bad):
    case = named_case("same")
    holes = selection([0, 1, 2], [2.0, 0.0, 1.5], 3)
    for groups, run in (("samples", case.input_grad), ("channels", case.weight_grad)):
        rounding = true_rounding(case.g, 4, groups, holes)
        clean = run(rounding, implementation)
        healthy, case.g = case.g, case.g.copy()
        case.g[1] = bad
        if groups == "samples":
            rounding = dataclasses.replace(rounding, lo=rounding.lo.copy())
            rounding.lo[1] = bad
        np.testing.assert_array_equal(run(rounding, implementation), clean)
        case.g = healthy


@each
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_dropped_channel_is_not_even_looked_at(implementation, bad):
    case = named_case("same")
    holes = selection([0, 1, 3], [2.0, 0.0, 1.5], 4)
    rounding = true_rounding(case.g, 4, "channels", None, holes)
    clean = case.weight_grad(rounding, implementation)
    np.testing.assert_array_equal(clean[..., [1, 2]], 0)
    case.g[..., 1:3] = bad
    rounding.lo[1] = rounding.value_range[1] = bad
    np.testing.assert_array_equal(case.weight_grad(rounding, implementation), clean)


@each
def test_nan_poisons_its_group_and_no_other(implementation):
    case = named_case("same")
    rounding = true_rounding(case.g, 4, "samples")
    clean = case.input_grad(rounding, implementation)
    poisoned = dataclasses.replace(rounding, lo=rounding.lo.copy())
    poisoned.lo[1] = np.nan
    dx = case.input_grad(poisoned, implementation)
    assert np.isnan(dx[1]).all()
    np.testing.assert_array_equal(dx[[0, 2]], clean[[0, 2]])

    rounding = true_rounding(case.g, 4, "channels")
    clean = case.weight_grad(rounding, implementation)
    poisoned = dataclasses.replace(rounding, lo=rounding.lo.copy())
    poisoned.lo[2] = np.nan
    dw = case.weight_grad(poisoned, implementation)
    assert np.isnan(dw[..., 2]).all()
    np.testing.assert_array_equal(dw[..., [0, 1, 3]], clean[..., [0, 1, 3]])


@each
def test_empty_batch(implementation):
    case = make_case(0, 0, (4, 4), 3, 5, (3, 3))
    assert case.forward(implementation).shape == (0, 2, 2, 5)
    rounding = integer_rounding(case.g, 4, "samples")
    assert case.input_grad(rounding, implementation).shape == (0, 4, 4, 3)
    rounding = integer_rounding(case.g, 4, "channels")
    dw = case.weight_grad(rounding, implementation)
    np.testing.assert_array_equal(dw, np.zeros((3, 3, 3, 5)))


# What is refused


def bits(*shape, batch_ndim=0) -> PackedBits:
    return PackedBits.pack(jnp.ones(shape, bool), batch_ndim=batch_ndim)


X, W = bits(2, 4, 4, 3, batch_ndim=1), bits(3, 3, 3, 5)
WINDOW = Window((3, 3))


@pytest.mark.parametrize(
    ("x", "w", "window", "message"),
    [
        (bits(2, 4, 3, batch_ndim=1), W, WINDOW, r"samples of shape \(H, W, C\)"),
        (X, bits(3, 3, 3), WINDOW, "w be of shape"),
        (X, W, Window((3, 2)), r"does not have the window size \(3, 2\)"),
        (X, bits(3, 3, 4, 5), WINDOW, "x has 3 channels, but w takes 4"),
        (bits(2, 2, 4, 3, batch_ndim=1), W, WINDOW, "larger than the padded input"),
    ],
)
def test_forward_operands(x, w, window, message):
    with pytest.raises(ValueError, match=message):
        kernels.forward(x, w, window)


def test_sums_that_could_exceed_the_exact_range():
    c = 2**24
    words = jax.ShapeDtypeStruct((1, c // 32), jnp.uint32)
    x = PackedBits(words, (1, 1, c))
    w = PackedBits(jax.ShapeDtypeStruct((c // 32,), jnp.uint32), (1, 1, c, 1))
    with pytest.raises(ValueError, match=r"exceed 2\^24"):
        kernels.forward(x, w, Window())


@pytest.mark.parametrize(
    ("g", "error", "message"),
    [
        (jnp.ones((2, 2, 3, 5)), ValueError, r"shape \(2, 2, 2, 5\)"),
        (jnp.ones((2, 2, 2, 5), jnp.bfloat16), TypeError, "g must be float32; got bfloat16"),
    ],
)
def test_gradient_operand(g, error, message):
    with pytest.raises(error, match=message):
        kernels.input_grad(g, W, None, WINDOW, (4, 4))
    with pytest.raises(error, match=message):
        kernels.weight_grad(g, X, None, WINDOW)


def test_gradient_of_other_channels():
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2, 5\)"):
        kernels.input_grad(jnp.ones((2, 2, 2, 4)), W, None, WINDOW, (4, 4))


def test_gradient_of_another_batch():
    with pytest.raises(ValueError, match="shape"):
        kernels.weight_grad(jnp.ones((3, 2, 2, 5)), X, None, WINDOW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0}, "bits must be from 1 to 8; got 0"),
        ({"bits": 9}, "bits must be from 1 to 8; got 9"),
        ({"groups": "rows"}, "groups must be one of"),
        ({"lo": np.zeros(3, np.float32)}, "one entry for each kept group"),
        ({"value_range": np.ones((2, 1), np.float32)}, "one entry for each kept group"),
        ({"samples": unit([0], 3)}, "keeps 1 of 3, but g has 2"),
        ({"samples": unit([0, 1, 1], 2)}, "keeps 3 of 2"),
        ({"samples": unit([1], 2)}, "one entry for each kept group"),
        ({"seed": np.zeros(2, np.int32)}, r"seed must be uint32\[2\]; got int32\[2\]"),
        ({"seed": np.zeros(3, np.uint32)}, r"seed must be uint32\[2\]; got uint32\[3\]"),
    ],
)
def test_rounding_operand(change, message):
    g = jnp.ones((2, 2, 2, 5))
    rounding = dataclasses.replace(integer_rounding(g, 4, "samples"), **change)
    with pytest.raises(ValueError, match=message):
        kernels.input_grad(g, W, rounding, WINDOW, (4, 4))
    with pytest.raises(ValueError, match=message):
        kernels.weight_grad(g, X, rounding, WINDOW)


def test_input_gradient_takes_groups_of_samples_and_all_channels():
    g = jnp.ones((2, 2, 2, 5))
    with pytest.raises(ValueError, match="groups must be one of"):
        kernels.input_grad(g, W, integer_rounding(g, 4, "channels"), WINDOW, (4, 4))
    rounding = integer_rounding(g, 4, "samples", None, unit([0], 5))
    with pytest.raises(ValueError, match="contracts over output channels"):
        kernels.input_grad(g, W, rounding, WINDOW, (4, 4))


def test_weight_gradient_refuses_sample_groups_with_pruned_channels():
    g = jnp.ones((2, 2, 2, 5))
    rounding = integer_rounding(g, 4, "samples", None, unit([0], 5))
    with pytest.raises(UnsupportedError, match="xla: groups of samples do not go with pruned"):
        kernels.weight_grad(g, X, rounding, WINDOW, implementation="xla")


def test_sums_of_codes_that_exceed_int32_are_declined_by_each():
    o = 2**20
    g = jax.ShapeDtypeStruct((1, 2, 2, o), jnp.float32)
    w = PackedBits(jax.ShapeDtypeStruct((9 * o // 32,), jnp.uint32), (3, 3, 1, o))
    rounding = integer_rounding(np.ones((1, 1, 1, 1)), 8, "samples")
    with pytest.raises(UnsupportedError, match=r"xla: sums over 9437184 codes of 8 bits exceed"):
        kernels.input_grad(g, w, rounding, WINDOW, (4, 4))
    words = jax.ShapeDtypeStruct((2**15, 2**9), jnp.uint32)
    x, g = PackedBits(words, (128, 128, 1)), jax.ShapeDtypeStruct((2**15, 128, 128, 1), jnp.float32)
    rounding = integer_rounding(np.ones((1, 1, 1, 1)), 8, "channels")
    with pytest.raises(UnsupportedError, match=r"xla: sums over \d+ codes of 8 bits exceed int32"):
        kernels.weight_grad(g, x, rounding, Window())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("size", (0, 3), "window sizes must be at least 1"),
        ("strides", (1, 0), "strides must be at least 1"),
        ("padding", ((0, 0), (-1, 0)), "padding must not be negative"),
    ],
)
def test_window_fields(field, value, message):
    with pytest.raises(ValueError, match=message):
        Window(**{field: value})


@given(st.tuples(*[st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(5, 12))] * 2))
def test_output_size_is_that_of_same_padding(axes):
    kernel, strides, size = zip(*axes, strict=True)
    padding = reference.same_padding(size, kernel, strides)
    expected = tuple(math.ceil(n / s) for n, s in zip(size, strides, strict=True))
    assert Window(kernel, strides, padding).output_size(size) == expected
