"""Valid calls of every native kernel, straight through XLA's foreign function interface.

A call is made of plain NumPy arrays, so that tests can spoil it in ways that the Python functions
around the kernels would never let through.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Shape = tuple[int, ...]
Random = np.random.Generator


@dataclasses.dataclass
class Call:
    """One call of a kernel.

    Attributes:
      kernel: its name.
      operands: its operands.
      results: shape and type of each result.
      attributes: its attributes.
      in_place: numbers of operands, each with that of the result that takes its place in memory.
    """

    kernel: str
    operands: list[np.ndarray]
    results: list[tuple[Shape, Any]]
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    in_place: dict[int, int] = dataclasses.field(default_factory=dict)

    def run(self) -> list[np.ndarray]:
        """The results; raises where the kernel refuses."""
        results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in self.results]
        kernel = jax.ffi.ffi_call(
            f"fqt_jax_{self.kernel}", results, input_output_aliases=self.in_place or None
        )
        return [np.asarray(a) for a in kernel(*self.operands, **self.attributes)]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution."""

    n: int
    c: int
    o: int
    size: tuple[int, int]
    window: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int, int, int]

    @property
    def out(self) -> tuple[int, int]:
        top, bottom, left, right = self.padding
        padded = self.size[0] + top + bottom, self.size[1] + left + right
        h, w = ((p - k) // s + 1 for p, k, s in zip(padded, self.window, self.strides, strict=True))
        return h, w

    @property
    def sizes(self) -> np.ndarray:
        each = (*self.size, self.c, self.o, *self.window, *self.strides, *self.padding)
        return np.array(each, np.int64)

    @property
    def x(self) -> Shape:
        return self.n, *self.size, self.c

    @property
    def w(self) -> Shape:
        return *self.window, self.c, self.o

    @property
    def y(self) -> Shape:
        return self.n, *self.out, self.o


def words(bits: int) -> int:
    return -(-bits // 32)


def any_words(rng: Random, *shape: int) -> np.ndarray:
    return rng.integers(0, 2**32, shape, np.uint32)


def floats(rng: Random, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def selection(rng: Random, size: int, selects: bool) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights of some of ``size`` groups; none where there is no selection."""
    k = int(rng.integers(0, size + 1)) if selects else 0
    indices = np.sort(rng.choice(size, k, replace=False)).astype(np.int32)
    weights = rng.choice(np.array([0.0, 0.5, 1.0, 3.0], np.float32), k)
    return indices, weights


def forward(rng: Random, g: Geometry) -> Call:
    terms = math.prod(g.w[:3])
    x = any_words(rng, g.n, words(math.prod(g.x[1:])))
    w = any_words(rng, words(math.prod(g.w)))
    z = (g.y, np.int16 if terms <= 32767 else np.int32)
    return Call("forward", [x, w], [z], {"sizes": g.sizes})


def _rounding(rng: Random, groups: int) -> list[np.ndarray]:
    return [-2 - floats(rng, groups) ** 2, 1 + floats(rng, groups) ** 2, any_words(rng, 2)]


def input_grad(rng: Random, g: Geometry) -> Call:
    selects, has_mask, scatters = (bool(v) for v in rng.integers(0, 2, 3))
    indices, weights = selection(rng, g.n, selects)
    kept = len(indices) if selects else g.n
    mask = any_words(rng, *((g.n, words(math.prod(g.x[1:]))) if has_mask else (0, 0)))
    return Call(
        "input_grad",
        [
            floats(rng, *g.y),
            any_words(rng, words(math.prod(g.w))),
            *_rounding(rng, kept),
            indices,
            weights,
            mask,
        ],
        [((g.n if scatters else kept, *g.x[1:]), np.float32)],
        {
            "sizes": g.sizes,
            "bits": np.int64(rng.integers(1, 9)),
            "selects_samples": selects,
            "has_mask": has_mask,
            "scatters": scatters,
        },
    )


def weight_grad(rng: Random, g: Geometry) -> Call:
    selects_samples, selects_channels = (bool(v) for v in rng.integers(0, 2, 2))
    channels, channel_weights = selection(rng, g.o, selects_channels)
    kept = len(channels) if selects_channels else g.o
    return Call(
        "weight_grad",
        [
            floats(rng, *g.y),
            any_words(rng, g.n, words(math.prod(g.x[1:]))),
            *_rounding(rng, kept),
            *selection(rng, g.n, selects_samples),
            channels,
            channel_weights,
        ],
        [(g.w, np.float32)],
        {
            "sizes": g.sizes,
            "bits": np.int64(rng.integers(1, 9)),
            "selects_samples": selects_samples,
            "selects_channels": selects_channels,
        },
    )


def float_input_grad(rng: Random, g: Geometry) -> Call:
    has_mask = bool(rng.integers(0, 2))
    mask = any_words(rng, *((g.n, words(math.prod(g.x[1:]))) if has_mask else (0, 0)))
    return Call(
        "float_input_grad",
        [floats(rng, *g.y), any_words(rng, words(math.prod(g.w))), mask],
        [(g.x, np.float32)],
        {"sizes": g.sizes, "has_mask": has_mask},
    )


def float_weight_grad(rng: Random, g: Geometry) -> Call:
    rounds, selects = (bool(v) for v in rng.integers(0, 2, 2))
    indices, weights = selection(rng, g.n, selects)
    kept = len(indices) if selects else g.n
    return Call(
        "float_weight_grad",
        [
            floats(rng, *g.y),
            any_words(rng, g.n, words(math.prod(g.x[1:]))),
            *_rounding(rng, kept if rounds else 0),
            indices,
            weights,
        ],
        [(g.w, np.float32)],
        {
            "sizes": g.sizes,
            "bits": np.int64(rng.integers(1, 9) if rounds else 0),
            "selects_samples": selects,
        },
    )


def float_conv(rng: Random, g: Geometry) -> Call:
    operands = [floats(rng, *g.x), floats(rng, *g.w)]
    return Call("float_conv", operands, [(g.y, np.float32)], {"sizes": g.sizes})


def float_conv_weight_grad(rng: Random, g: Geometry) -> Call:
    operands = [floats(rng, *g.x), floats(rng, *g.y)]
    return Call("float_conv_weight_grad", operands, [(g.w, np.float32)], {"sizes": g.sizes})


CONVOLUTIONS: dict[str, Callable[[Random, Geometry], Call]] = {
    "forward": forward,
    "input_grad": input_grad,
    "weight_grad": weight_grad,
    "float_input_grad": float_input_grad,
    "float_weight_grad": float_weight_grad,
    "float_conv": float_conv,
    "float_conv_weight_grad": float_conv_weight_grad,
}


def source(rng: Random, shape: Shape) -> np.ndarray:
    dtype = rng.choice([np.int16, np.int32, np.float32])
    return rng.integers(-40, 40, shape).astype(dtype)


def _pooled(shape: Shape, pool: int) -> Shape:
    return shape[0], shape[1] // pool, shape[2] // pool, shape[3]


def _pool(rng: Random, shape: Shape) -> int:
    return int(rng.integers(1, max(1, min(3, *shape[1:3])) + 1))


def moments(rng: Random, shape: Shape) -> Call:
    weights = floats(rng, shape[0] if rng.integers(0, 2) else 0)
    thresholds = floats(rng, 2, shape[3])
    operands = [source(rng, shape), thresholds, weights]
    return Call("moments", operands, [((6, shape[3]), np.float32)])


def encode(rng: Random, shape: Shape) -> Call:
    pool, n = _pool(rng, shape), shape[0]
    row = ((n, words(math.prod(_pooled(shape, pool)[1:]))), np.uint32)
    operands = [source(rng, shape), floats(rng, 6, shape[3])]
    return Call("encode", operands, [row, row, ((n,), np.float32)], {"pool": np.int64(pool)})


def activate(rng: Random, shape: Shape) -> Call:
    pool = _pool(rng, shape)
    out = _pooled(shape, pool)
    offsets = floats(rng, shape[0] if rng.integers(0, 2) else 0)
    added = floats(rng, *(out if rng.integers(0, 2) else (0,)))
    operands = [source(rng, shape), floats(rng, 6, shape[3]), offsets, added]
    return Call("activate", operands, [(out, np.float32)], {"pool": np.int64(pool)})


def _kept_gradient(rng: Random, shape: Shape, pool: int, selects: bool) -> list[np.ndarray]:
    indices, _ = selection(rng, shape[0], selects)
    kept = len(indices) if selects else shape[0]
    return [floats(rng, kept, *_pooled(shape, pool)[1:]), indices]


def gradient_sums(rng: Random, shape: Shape) -> Call:
    pool, selects = _pool(rng, shape), bool(rng.integers(0, 2))
    d, indices = _kept_gradient(rng, shape, pool, selects)
    return Call(
        "gradient_sums",
        [source(rng, shape), floats(rng, 6, shape[3]), d, indices],
        [((4, shape[3]), np.float32)],
        {"pool": np.int64(pool), "selects_samples": selects},
    )


def gradient(rng: Random, shape: Shape) -> Call:
    pool, selects = _pool(rng, shape), bool(rng.integers(0, 2))
    n, c = shape[0], shape[3]
    d, indices = _kept_gradient(rng, shape, pool, selects)
    weights = floats(rng, n if rng.integers(0, 2) else 0)
    return Call(
        "gradient",
        [source(rng, shape), floats(rng, 12, c), d, indices, weights],
        [(shape, np.float32), *_bounds(shape)],
        {"pool": np.int64(pool), "selects_samples": selects},
    )


def _bounds(shape: Shape) -> list[tuple[Shape, Any]]:
    """Those of one position are the gradient itself, and are not asked for."""
    n, h, w, c = shape
    return [((0 if h == w == 1 else n, c), np.float32)] * 2


def encode_normed(rng: Random, shape: Shape) -> Call:
    n, c = shape[0], shape[3]
    row = ((n, words(math.prod(shape[1:]))), np.uint32)
    operands = [source(rng, shape), floats(rng, 6, c), floats(rng, 6, c)]
    attributes = {"epsilon": np.float32(1e-5)}
    return Call("encode_normed", operands, [row, row, ((n,), np.float32)], attributes)


def gradient_normed(rng: Random, shape: Shape) -> Call:
    selects, c = bool(rng.integers(0, 2)), shape[3]
    d, indices = _kept_gradient(rng, shape, 1, selects)
    return Call(
        "gradient_normed",
        [source(rng, shape), floats(rng, 6, c), floats(rng, 6, c), d, indices],
        [(shape, np.float32), *_bounds(shape), ((8, c), np.float32)],
        {"epsilon": np.float32(1e-5), "selects_samples": selects},
    )


TRANSFORMS: dict[str, Callable[[Random, Shape], Call]] = {
    "moments": moments,
    "encode": encode,
    "activate": activate,
    "gradient_sums": gradient_sums,
    "gradient": gradient,
    "encode_normed": encode_normed,
    "gradient_normed": gradient_normed,
}


def encode_weights(rng: Random, shape: Shape) -> Call:
    rows, o = math.prod(shape[:-1]), shape[-1]
    results = [((words(rows * o),), np.uint32), ((o,), np.float32)]
    return Call("encode_weights", [floats(rng, rows, o)], results)


def finish_weight_grad(rng: Random, shape: Shape) -> Call:
    operands = [floats(rng, *shape), floats(rng, *shape), floats(rng, shape[-1])]
    attributes = {"clips": bool(rng.integers(0, 2))}
    return Call("finish_weight_grad", operands, [(shape, np.float32)], attributes, {0: 0})


def adam(rng: Random, shape: Shape) -> Call:
    operands = [*(floats(rng, *shape) for _ in range(3)), floats(rng, 7)]
    return Call("adam", operands, [(shape, np.float32)] * 3, {}, {0: 0, 1: 1, 2: 2})


WEIGHTS: dict[str, Callable[[Random, Shape], Call]] = {
    "encode_weights": encode_weights,
    "finish_weight_grad": finish_weight_grad,
    "adam": adam,
}


def water_filling(rng: Random, n: int) -> Call:
    k = np.int32(rng.integers(0, n + 1))
    return Call("water_filling", [np.abs(floats(rng, n)), np.array(k)], [((n,), np.float32)])


def systematic(rng: Random, n: int) -> Call:
    k = int(rng.integers(0, n + 1))
    p = rng.random(n).astype(np.float32)
    results = [((k,), np.int32), ((k,), np.float32)]
    return Call("systematic", [p, any_words(rng, 2)], results)


DRAWS: dict[str, Callable[[Random, int], Call]] = {
    "water_filling": water_filling,
    "systematic": systematic,
}


def _attention_shape(rng: Random) -> Shape:
    n, length, heads, d = (int(v) for v in rng.integers(0, [3, 40, 3, 20]))
    return n, length, 3, heads, d


def attention(rng: Random, shape: Shape) -> Call:
    n, length, _, heads, d = shape
    attributes = {"scale": np.float32(0.5), "is_causal": bool(rng.integers(0, 2))}
    out = ((n, length, heads, d), np.float32)
    return Call("attention", [floats(rng, *shape)], [out], attributes)


def attention_grad(rng: Random, shape: Shape) -> Call:
    n, length, _, heads, d = shape
    attributes = {"scale": np.float32(0.5), "is_causal": bool(rng.integers(0, 2))}
    operands = [floats(rng, *shape), floats(rng, n, length, heads, d)]
    return Call("attention_grad", operands, [(shape, np.float32)], attributes)


ATTENTION: dict[str, Callable[[Random, Shape], Call]] = {
    "attention": attention,
    "attention_grad": attention_grad,
}

KERNELS = [*CONVOLUTIONS, *TRANSFORMS, *WEIGHTS, *DRAWS, *ATTENTION]


def ordinary(rng: Random, kernel: str) -> Call:
    """A call that a kernel serves, of small and ordinary sizes, empty ones among them."""
    if kernel in CONVOLUTIONS:
        window = tuple(int(v) for v in rng.integers(1, 4, 2))
        size = tuple(int(v) for v in rng.integers(3, 6, 2))
        geometry = Geometry(
            n=int(rng.integers(0, 6)),
            c=int(rng.integers(0, 9)),
            o=int(rng.integers(0, 40)),
            size=size,
            window=window,
            strides=tuple(int(v) for v in rng.integers(1, 3, 2)),
            padding=tuple(int(v) for v in rng.integers(0, 3, 4)),
        )
        return CONVOLUTIONS[kernel](rng, geometry)
    if kernel in TRANSFORMS:
        n, c = int(rng.integers(0, 4)), int(rng.choice([0, 1, 8, 33]))
        h, w = (int(v) for v in rng.integers(1, 6, 2))
        return TRANSFORMS[kernel](rng, (n, h, w, c))
    if kernel in ATTENTION:
        return ATTENTION[kernel](rng, _attention_shape(rng))
    if kernel in DRAWS:
        return DRAWS[kernel](rng, int(rng.integers(0, 40)))
    shape = tuple(int(v) for v in rng.integers(0, 20, rng.integers(1, 5)))
    return WEIGHTS[kernel](rng, shape)
