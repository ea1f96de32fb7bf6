"""How each kernel is called: its operands, results and attributes, and what it declines."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fqt_jax.binarize import WORD_BITS, PackedBits
from fqt_jax.kernels.contract import Pair, Rounding, Window, sum_dtype
from fqt_jax.kernels.dispatch import Kernel
from fqt_jax.kernels.native.library import call
from fqt_jax.kernels.normed import Normed
from fqt_jax.kernels.scaling import (
    declines_input_grad,
    declines_samplewise_weight_grad,
    declines_weight_grad,
)
from fqt_jax.kernels.transforms import Flow, Line, pooled_shape
from fqt_jax.kernels.xla import IMPLEMENTATION as XLA
from fqt_jax.selection import Selection


def product_form(
    product: str, x_shape: tuple[int, ...], o: int, window: Window, rounding: Rounding | None = None
) -> str:
    """How the native kernels compute an integer product here: which of their forms is the fastest.

    Args:
      product: ``forward``, ``input_grad`` or ``weight_grad``.
      x_shape: of the layer's input, ``[N, H, W, C]``.
      o: number of output channels.
      window: of the layer.
      rounding: of a gradient; ``None`` for ``forward``.

    Returns:
      ``look_up``, ``popcount`` or ``tiles`` (see ``csrc/README.md``).

    Raises:
      ValueError: sizes that no product has.
    """
    from fqt_jax.kernels import _native

    n, h, w, c = x_shape
    samples = None if rounding is None else rounding.samples
    channels = None if rounding is None else rounding.channels
    form: str = _native.product_form(
        product,
        n,
        _sizes((h, w), c, o, window).tolist(),
        n if samples is None else samples.indices.shape[0],
        o if channels is None else channels.indices.shape[0],
    )
    return form


def _forward(x: PackedBits, w: PackedBits, *, window: Window, platform: str) -> jax.Array:
    n, (h, width, c), o = x.words.shape[0], x.shape, w.shape[3]
    shape = (n, *window.output_size((h, width)), o)
    out = jax.ShapeDtypeStruct(shape, sum_dtype(math.prod(window.size) * c))
    return call("forward", out, x.words, w.words, sizes=_sizes((h, width), c, o, window))


def _input_grad(
    g: jax.Array,
    w: PackedBits,
    rounding: Rounding | None,
    mask: PackedBits | None,
    *,
    window: Window,
    input_size: Pair,
    compact: bool,
    platform: str,
) -> jax.Array:
    _, _, c, o = w.shape
    mask_words = jnp.zeros((0, 0), jnp.uint32) if mask is None else mask.words
    sizes = _sizes(input_size, c, o, window)
    if rounding is None:
        out = jax.ShapeDtypeStruct((g.shape[0], *input_size, c), jnp.float32)
        return call(
            "float_input_grad",
            out,
            g,
            w.words,
            mask_words,
            sizes=sizes,
            has_mask=mask is not None,
        )
    n = rounding.lo.shape[0] if compact else g.shape[0]
    return call(
        "input_grad",
        jax.ShapeDtypeStruct((n, *input_size, c), jnp.float32),
        g,
        w.words,
        rounding.lo,
        rounding.value_range,
        rounding.seed,
        *_selection(rounding.samples),
        mask_words,
        sizes=sizes,
        bits=np.int64(rounding.bits),
        selects_samples=rounding.samples is not None,
        has_mask=mask is not None,
        scatters=not compact,
    )


def _declines_input_grad(
    g: jax.Array, w: PackedBits, rounding: Rounding | None, mask: Any, **static: Any
) -> str | None:
    return None if rounding is None else declines_input_grad(g, w, rounding, mask, **static)


def _weight_grad(
    g: jax.Array, x: PackedBits, rounding: Rounding | None, *, window: Window, platform: str
) -> jax.Array:
    h, width, c = x.shape
    o = g.shape[3]
    out = jax.ShapeDtypeStruct((*window.size, c, o), jnp.float32)
    sizes = _sizes((h, width), c, o, window)
    if rounding is None or rounding.groups == "samples":
        empty = jnp.zeros(0, jnp.float32)
        return call(
            "float_weight_grad",
            out,
            g,
            x.words,
            empty if rounding is None else rounding.lo,
            empty if rounding is None else rounding.value_range,
            jnp.zeros(2, jnp.uint32) if rounding is None else rounding.seed,
            *_selection(None if rounding is None else rounding.samples),
            sizes=sizes,
            bits=np.int64(0 if rounding is None else rounding.bits),
            selects_samples=rounding is not None and rounding.samples is not None,
        )
    return call(
        "weight_grad",
        out,
        g,
        x.words,
        rounding.lo,
        rounding.value_range,
        rounding.seed,
        *_selection(rounding.samples),
        *_selection(rounding.channels),
        sizes=sizes,
        bits=np.int64(rounding.bits),
        selects_samples=rounding.samples is not None,
        selects_channels=rounding.channels is not None,
    )


def _declines_weight_grad(
    g: jax.Array, x: PackedBits, rounding: Rounding | None, **static: Any
) -> str | None:
    if rounding is None:
        return None
    if rounding.groups == "samples":
        return declines_samplewise_weight_grad(rounding)
    return declines_weight_grad(g, x, rounding, **static)


def _moments(
    source: jax.Array,
    thresholds: tuple[jax.Array, jax.Array],
    weights: jax.Array | None,
    *,
    platform: str,
) -> list[jax.Array]:
    out = jax.ShapeDtypeStruct((6, source.shape[3]), jnp.float32)
    return list(call("moments", out, source, jnp.stack(thresholds), _or_none(weights)))


def _encode(
    source: jax.Array, line: Line, *, pool: int, platform: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    n, *shape = pooled_shape(source.shape, pool)
    words = jax.ShapeDtypeStruct((n, -(-math.prod(shape) // WORD_BITS)), jnp.uint32)
    nan = jax.ShapeDtypeStruct((n,), jnp.float32)
    return call("encode", (words, words, nan), source, jnp.stack(line), pool=np.int64(pool))


def _activate(
    source: jax.Array,
    line: Line,
    offsets: jax.Array | None,
    added: jax.Array | None,
    *,
    pool: int,
    platform: str,
) -> jax.Array:
    out = jax.ShapeDtypeStruct(pooled_shape(source.shape, pool), jnp.float32)
    offsets, added = _or_none(offsets), _or_none(added)
    return call("activate", out, source, jnp.stack(line), offsets, added, pool=np.int64(pool))


def _gradient_sums(
    source: jax.Array,
    line: Line,
    d: jax.Array,
    samples: jax.Array | None,
    *,
    pool: int,
    platform: str,
) -> list[jax.Array]:
    sums = call(
        "gradient_sums",
        jax.ShapeDtypeStruct((4, source.shape[3]), jnp.float32),
        source,
        jnp.stack(line),
        d,
        _or_none(samples, jnp.int32),
        pool=np.int64(pool),
        selects_samples=samples is not None,
    )
    return list(sums)


def _gradient(
    source: jax.Array,
    line: Line,
    flow: Flow,
    d: jax.Array,
    samples: jax.Array | None,
    weights: jax.Array | None,
    *,
    pool: int,
    overwrites: bool,
    platform: str,
) -> Any:
    bounds = _bounds_type(source.shape)
    rows = (*line, line.p1, flow.h1, flow.k1, line.p0, flow.h0, flow.k0)
    g, lo, hi = call(
        "gradient",
        (jax.ShapeDtypeStruct(source.shape, jnp.float32), bounds, bounds),
        source,
        jnp.stack(rows),
        d,
        _or_none(samples, jnp.int32),
        _or_none(weights),
        in_place={0: 0} if overwrites and source.dtype == jnp.float32 else None,
        pool=np.int64(pool),
        selects_samples=samples is not None,
    )
    return g, *_bounds(g, lo, hi)


def _bounds_type(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Of a gradient's bounds; none are asked for where there is one position: they are itself."""
    n, h, w, c = shape
    return jax.ShapeDtypeStruct((0 if h == w == 1 else n, c), jnp.float32)


def _bounds(g: jax.Array, lo: jax.Array, hi: jax.Array) -> tuple[jax.Array, jax.Array]:
    n, h, w, c = g.shape
    if not h == w == 1:
        return lo, hi
    itself = g.reshape(n, c)
    return itself, itself


def _encode_normed(
    source: jax.Array, normed: Normed, *, epsilon: float, platform: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    n, *shape = source.shape
    words = jax.ShapeDtypeStruct((n, -(-math.prod(shape) // WORD_BITS)), jnp.uint32)
    nan = jax.ShapeDtypeStruct((n,), jnp.float32)
    lines = map(jnp.stack, normed)
    return call("encode_normed", (words, words, nan), source, *lines, epsilon=np.float32(epsilon))


def _gradient_normed(
    source: jax.Array,
    normed: Normed,
    d: jax.Array,
    samples: jax.Array | None,
    *,
    epsilon: float,
    platform: str,
) -> Any:
    bounds = _bounds_type(source.shape)
    g, lo, hi, sums = call(
        "gradient_normed",
        (
            jax.ShapeDtypeStruct(source.shape, jnp.float32),
            bounds,
            bounds,
            jax.ShapeDtypeStruct((8, source.shape[3]), jnp.float32),
        ),
        source,
        *map(jnp.stack, normed),
        d,
        _or_none(samples, jnp.int32),
        epsilon=np.float32(epsilon),
        selects_samples=samples is not None,
    )
    return g, *_bounds(g, lo, hi), sums


def _encode_weights(w: jax.Array, *, platform: str) -> tuple[jax.Array, jax.Array]:
    words = jax.ShapeDtypeStruct((-(-w.size // WORD_BITS),), jnp.uint32)
    scale = jax.ShapeDtypeStruct((w.shape[-1],), jnp.float32)
    return call("encode_weights", (words, scale), w.reshape(-1, w.shape[-1]))


def _finish_weight_grad(
    dw: jax.Array, w: jax.Array, d_scale: jax.Array, *, clip: bool, platform: str
) -> jax.Array:
    # Without a reshape: XLA would copy the gradient for it, as it is to be overwritten.
    out = jax.ShapeDtypeStruct(w.shape, jnp.float32)
    return call("finish_weight_grad", out, dw, w, d_scale, in_place={0: 0}, clips=clip)


def _float_conv(x: jax.Array, w: jax.Array, *, window: Window, platform: str) -> jax.Array:
    n, h, width, c = x.shape
    o = w.shape[3]
    out = jax.ShapeDtypeStruct((n, *window.output_size((h, width)), o), jnp.float32)
    return call("float_conv", out, x, w, sizes=_sizes((h, width), c, o, window))


def _float_conv_weight_grad(
    x: jax.Array, g: jax.Array, *, window: Window, platform: str
) -> jax.Array:
    _, h, width, c = x.shape
    o = g.shape[3]
    out = jax.ShapeDtypeStruct((*window.size, c, o), jnp.float32)
    return call("float_conv_weight_grad", out, x, g, sizes=_sizes((h, width), c, o, window))


# Above these XLA's products are as fast: measured at 224x224x3, and on 1x1 windows of 64 channels.
_FEW_CHANNELS = 16
_FEW_WEIGHTS = 2**16


def _declines_float_conv(x: jax.Array, other: jax.Array, *, window: Window) -> str | None:
    if x.dtype != jnp.float32 or other.dtype != jnp.float32:
        return "floats of other types than float32 are left to XLA"
    if window.size == (1, 1) or x.shape[3] >= _FEW_CHANNELS:
        return f"it serves images of fewer than {_FEW_CHANNELS} channels, and no 1x1 windows"
    if math.prod(window.size) * x.shape[3] * other.shape[3] > _FEW_WEIGHTS:
        return f"it serves no more than {_FEW_WEIGHTS} weights"
    return _declines_empty(x, other)


def _water_filling(importance: jax.Array, k: jax.Array, *, platform: str) -> jax.Array:
    out = jax.ShapeDtypeStruct(importance.shape, jnp.float32)
    return call("water_filling", out, importance, k)


def _systematic(
    p: jax.Array, seed: jax.Array, *, k: int, platform: str
) -> tuple[jax.Array, jax.Array]:
    types = jax.ShapeDtypeStruct((k,), jnp.int32), jax.ShapeDtypeStruct((k,), jnp.float32)
    return call("systematic", types, p, seed)


def _adam(g: jax.Array, m: jax.Array, v: jax.Array, factors: jax.Array, *, platform: str) -> Any:
    like = (jax.ShapeDtypeStruct(g.shape, jnp.float32),) * 3
    return call("adam", like, g, m, v, factors, in_place={0: 0, 1: 1, 2: 2})


def _declines_adam(g: jax.Array, m: jax.Array, v: jax.Array, factors: jax.Array) -> str | None:
    return _declines_other_than_float32(g, m, v) or _declines_empty(g)


def _attention(qkv: jax.Array, *, scale: float, is_causal: bool, platform: str) -> jax.Array:
    n, length, _, heads, d = qkv.shape
    out = jax.ShapeDtypeStruct((n, length, heads, d), jnp.float32)
    return call("attention", out, qkv, scale=np.float32(scale), is_causal=is_causal)


def _attention_grad(
    qkv: jax.Array, dy: jax.Array, *, scale: float, is_causal: bool, platform: str
) -> jax.Array:
    out = jax.ShapeDtypeStruct(qkv.shape, jnp.float32)
    return call("attention_grad", out, qkv, dy, scale=np.float32(scale), is_causal=is_causal)


def _declines_attention(*operands: jax.Array, **_: Any) -> str | None:
    return _declines_other_than_float32(*operands) or _declines_empty(*operands)


def _declines_other_than_float32(*operands: jax.Array) -> str | None:
    found = {a.dtype.name for a in operands} - {"float32"}
    return f"operands are {', '.join(sorted(found))}, not float32" if found else None


def _declines_empty(*operands: Any, **_: Any) -> str | None:
    empty = any(leaf.size == 0 for leaf in jax.tree.leaves(operands))
    return "an operand is empty" if empty else None


def _sizes(input_size: Pair, c: int, o: int, window: Window) -> np.ndarray:
    (top, bottom), (left, right) = window.padding
    sizes = (*input_size, c, o, *window.size, *window.strides, top, bottom, left, right)
    return np.array(sizes, np.int64)


def _selection(selection: Selection | None) -> tuple[jax.Array, jax.Array]:
    if selection is None:
        return jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.float32)
    return selection.indices, selection.weights


def _or_none(a: jax.Array | None, dtype: Any = jnp.float32) -> jax.Array:
    """An operand that is left out is passed as an empty one."""
    return jnp.zeros(0, dtype) if a is None else a


def _or_xla(operation: str, own: Kernel) -> Kernel:
    """A kernel that leaves to XLA what it declines."""
    xla = XLA.kernels[operation]

    def run(*operands: Any, platform: str, **static: Any) -> Any:
        serves = own.declines(*operands, **static) is None
        return (own if serves else xla).run(*operands, platform=platform, **static)

    return Kernel(run, xla.declines)


KERNELS = {
    # Float convolutions but those of images, and what is empty, are XLA's.
    **XLA.kernels,
    "forward": Kernel(_forward),
    "input_grad": Kernel(_input_grad, _declines_input_grad),
    "weight_grad": Kernel(_weight_grad, _declines_weight_grad),
    **{
        operation: _or_xla(operation, Kernel(run, declines))
        for operation, run, declines in (
            ("moments", _moments, _declines_empty),
            ("encode", _encode, _declines_empty),
            ("activate", _activate, _declines_empty),
            ("gradient_sums", _gradient_sums, _declines_empty),
            ("gradient", _gradient, _declines_empty),
            ("encode_normed", _encode_normed, _declines_empty),
            ("gradient_normed", _gradient_normed, _declines_empty),
            ("encode_weights", _encode_weights, _declines_empty),
            ("finish_weight_grad", _finish_weight_grad, _declines_empty),
            ("float_conv", _float_conv, _declines_float_conv),
            ("float_conv_weight_grad", _float_conv_weight_grad, _declines_float_conv),
            ("water_filling", _water_filling, _declines_empty),
            ("systematic", _systematic, _declines_empty),
            ("adam", _adam, _declines_adam),
            ("attention", _attention, _declines_attention),
            ("attention_grad", _attention_grad, _declines_attention),
        )
    },
}
