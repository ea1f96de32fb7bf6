"""Packed bits and population counts in plain XLA, on every backend, in little memory.

Signs and the bit planes of codes are packed eight to a byte along the contraction. One byte of the
left operand meets a row of bytes of the right one::

    sum(sign_a * sign_b) = n - 2 * sum(popcount(a ^ b))
    sum(code * sign)     = 2 * sum(2^i * popcount(plane_i & sign)) - sum(code)

On the CPU counts of :data:`_CHUNK` bytes are added as bytes, which keeps 32 lanes in an AVX2
register, and only then widened: a word of 32 bits would leave it 8 lanes and no instruction that
counts them. Accelerators count the bits of ``uint32`` words, so there four bytes are joined to one.
Against XLA's float convolution on two AVX2 cores it was faster forward on each 3x3 layer of VGG-16
that was tried, and no faster for the gradients.

Work goes by blocks of samples (forward, input gradient) or rows of the window (weight gradient), so
that no operand of the contraction is ever unpacked to floats as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fqt_jax.binarize import PackedBits
from fqt_jax.kernels.contract import Pair, Rounding, Window, sum_dtype
from fqt_jax.kernels.dispatch import Implementation, Kernel
from fqt_jax.kernels.scaling import (
    declines_input_grad,
    declines_weight_grad,
    gradient_codes,
    input_sign_sums,
    per_sample,
    scale_input_grad,
    scale_weight_grad,
    take,
    tap_validity,
    weight_sign_sums,
)
from fqt_jax.kernels.xla import IMPLEMENTATION as XLA

_CHUNK = 24  # bytes whose counts fit one byte: 8 * 24 < 256; divides every 3x3 window of 64 n
_WORD_CHUNK = 18  # words; divides every 3x3 window of 64 n
_BLOCK = 2**17  # entries of the output that are computed at once


def forward(x: PackedBits, w: PackedBits, *, window: Window, platform: str) -> jax.Array:
    """See :func:`fqt_jax.kernels.forward`."""
    count = functools.partial(_count, platform)
    kh, kw, c, o = w.shape
    size = (x.shape[0], x.shape[1])
    out_h, out_w = window.output_size(size)
    dtype = sum_dtype(kh * kw * c)
    if x.words.size == 0 or w.words.size == 0:
        return jnp.zeros((x.words.shape[0], out_h, out_w, o), dtype)
    w_bits = w.unpack()
    columns = pack_bytes(w_bits, axis=2).reshape(-1, o)
    # A padded byte is zero and would count as eight signs of -1. What it adds depends on the
    # place alone, so it is taken away afterwards.
    tap_sums = jnp.sum(w.signs(jnp.int32), axis=2)
    rows, cols = (v.astype(jnp.int32) for v in map(jnp.asarray, tap_validity(size, window)))
    inside = jnp.einsum("hi,wj,ijo->hwo", rows, cols, tap_sums)
    outside = jnp.sum(tap_sums, axis=(0, 1), keepdims=True) - inside

    def sample(bits: jax.Array) -> jax.Array:
        taps = tap_columns(bits, window, (out_h, out_w))
        differing = count(jnp.bitwise_xor, taps.reshape(out_h * out_w, -1), columns)
        differing = differing.reshape(out_h, out_w, o)
        return (jnp.int32(kh * kw * c) - 2 * differing + outside).astype(dtype)

    return lax.map(sample, channel_bytes(x), batch_size=_block(out_h * out_w * o))


def input_grad(
    g: jax.Array,
    w: PackedBits,
    rounding: Rounding,
    mask: PackedBits | None,
    *,
    window: Window,
    input_size: Pair,
    compact: bool,
    platform: str,
) -> jax.Array:
    """See :func:`fqt_jax.kernels.input_grad`."""
    count = functools.partial(_count, platform)
    c = w.shape[2]
    h, width = input_size
    bits = rounding.bits
    codes = gradient_codes(g, rounding)
    sign_sums = input_sign_sums(w, window, input_size)
    if codes.size == 0 or c == 0:
        sums = jnp.zeros((codes.shape[0], h, width, c), jnp.int32)
        return scale_input_grad(sums, sign_sums, rounding, g.shape[0], mask, compact)
    # The transposed convolution is a convolution of the dilated gradient with the flipped window.
    columns = pack_bytes(w.unpack()[::-1, ::-1].transpose(0, 1, 3, 2), axis=2).reshape(-1, c)
    flipped = Window(window.size)

    def sample(codes: jax.Array) -> jax.Array:
        codes = codes.astype(jnp.uint8)
        planes = jnp.stack([pack_bytes((codes >> i) & 1, axis=2) for i in range(bits)])
        taps = jax.vmap(lambda a: tap_columns(spread(a, window, input_size), flipped, input_size))(
            planes
        )
        counts = count(jnp.bitwise_and, taps.reshape(bits * h * width, -1), columns)
        both = _weigh_planes(counts.reshape(bits, h, width, c))
        totals = jnp.sum(codes, axis=2, keepdims=True, dtype=jnp.int32)
        totals = tap_columns(spread(totals, window, input_size), flipped, input_size)
        return 2 * both - jnp.sum(totals, axis=2, keepdims=True)

    sums = lax.map(sample, codes, batch_size=_block(bits * h * width * c))
    return scale_input_grad(sums, sign_sums, rounding, g.shape[0], mask, compact)


def weight_grad(
    g: jax.Array, x: PackedBits, rounding: Rounding, *, window: Window, platform: str
) -> jax.Array:
    """See :func:`fqt_jax.kernels.weight_grad`."""
    count = functools.partial(_count, platform)
    (h, width, c), (kh, kw), bits = x.shape, window.size, rounding.bits
    codes = gradient_codes(g, rounding)
    kept = take(x, rounding.samples)
    sign_sums = weight_sign_sums(kept, rounding.samples, window)
    if codes.size == 0 or c == 0:
        sums = jnp.zeros((kh, kw, c, codes.shape[3]), jnp.int32)
        return scale_weight_grad(sums, sign_sums, rounding, g.shape[3])
    if rounding.samples is not None:
        codes = jnp.where(per_sample(rounding.samples.weights) == 0, jnp.zeros_like(codes), codes)
    codes = codes.astype(jnp.uint8)
    _, out_h, out_w, o = codes.shape
    # The contraction runs over samples and positions, so these are what is packed.
    flat = codes.reshape(-1, o)
    planes = [pack_bytes((flat >> i) & 1, axis=0) for i in range(bits)]
    columns = jnp.concatenate(planes, axis=1)
    by_place = jnp.sum(codes, axis=0, dtype=jnp.int32)
    rows, cols = (v.astype(jnp.int32) for v in map(jnp.asarray, tap_validity((h, width), window)))
    totals = jnp.einsum("hi,wj,hwo->ijo", rows, cols, by_place).reshape(kh, kw, 1, o)
    (top, bottom), (left, right) = window.padding
    padded = jnp.pad(
        kept.unpack().astype(jnp.uint8), ((0, 0), (top, bottom), (left, right), (0, 0))
    )
    down, across = window.strides

    def window_row(i: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(padded, i, (out_h - 1) * down + 1, axis=1)[:, ::down]
        last = (out_w - 1) * across + 1
        taps = [rows[:, :, j : j + last : across].reshape(-1, c) for j in range(kw)]
        packed = jnp.concatenate([pack_bytes(tap, axis=0) for tap in taps], axis=1)
        counts = lax.map(
            lambda row: count(jnp.bitwise_and, row[None], columns)[0],
            packed.T,
            batch_size=_block(bits * o),
        )
        return _weigh_planes(jnp.moveaxis(counts.reshape(kw, c, bits, o), 2, 0))

    both = lax.map(window_row, jnp.arange(kh))
    return scale_weight_grad(2 * both - totals, sign_sums, rounding, g.shape[3])


def pack_bytes(bits: jax.Array, axis: int) -> jax.Array:
    """Packs 0 and 1 along ``axis``, eight to a byte; the last byte is filled with zeros."""
    n = bits.shape[axis]
    pads = [(0, -n % 8 if i == axis else 0) for i in range(bits.ndim)]
    bits = jnp.pad(bits.astype(jnp.uint8), pads)
    shape = (*bits.shape[:axis], -(-n // 8), 8, *bits.shape[axis + 1 :])
    shifts = jnp.arange(8, dtype=jnp.uint8).reshape(8, *[1] * (bits.ndim - axis - 1))
    shifts = shifts.reshape((1,) * (axis + 1) + shifts.shape)
    return jnp.sum(bits.reshape(shape) << shifts, axis=axis + 1, dtype=jnp.uint8)


def channel_bytes(x: PackedBits) -> jax.Array:
    """``uint8[N, H, W, ceil(C / 8)]``."""
    h, w, c = x.shape
    if c % 32:
        return pack_bytes(x.unpack(), axis=3)
    return lax.bitcast_convert_type(x.words, jnp.uint8).reshape(-1, h, w, c // 8)


def tap_columns(x: jax.Array, window: Window, out: Pair) -> jax.Array:
    """``[H', W', kh * kw * K]``: what each position of ``x[H, W, K]`` sees, zeros outside."""
    padded = jnp.pad(x, (*window.padding, (0, 0)))
    (down, across), (kh, kw) = window.strides, window.size
    return jnp.concatenate(
        [
            padded[
                i : i + (out[0] - 1) * down + 1 : down, j : j + (out[1] - 1) * across + 1 : across
            ]
            for i in range(kh)
            for j in range(kw)
        ],
        axis=-1,
    )


def spread(a: jax.Array, window: Window, input_size: Pair) -> jax.Array:
    """Puts the strides between the entries of ``a[H', W', K]``, and around it zeros."""
    config = []
    for axis in (0, 1):
        k, s, before = window.size[axis], window.strides[axis], window.padding[axis][0]
        low = k - 1 - before
        spread = (a.shape[axis] - 1) * s + 1
        config.append((low, input_size[axis] + k - 1 - low - spread, s - 1))
    return lax.pad(a, jnp.zeros((), a.dtype), (*config, (0, 0, 0)))


def _count(
    platform: str, meet: Callable[[jax.Array, jax.Array], jax.Array], a: jax.Array, b: jax.Array
) -> jax.Array:
    """``sum_k popcount(meet(a[m, k], b[k, n]))`` as ``int32[m, n]``."""
    limit = _CHUNK
    if platform != "cpu":
        a, b, limit = _words(a), _words(b.T).T, _WORD_CHUNK
    size = a.shape[1]
    chunk = min(limit, size)
    n_chunks = -(-size // chunk)
    pad = n_chunks * chunk - size
    a = jnp.pad(a, ((0, 0), (0, pad))).reshape(-1, n_chunks, chunk).swapaxes(0, 1)
    b = jnp.pad(b, ((0, pad), (0, 0))).reshape(n_chunks, chunk, -1)

    def add(total: jax.Array, chunks: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        left, right = chunks
        count = lax.population_count(meet(left[:, :1], right[:1]))
        for k in range(1, chunk):
            count = count + lax.population_count(meet(left[:, k : k + 1], right[k : k + 1]))
        # Widening in the same loop would leave a quarter of the lanes.
        return total + lax.optimization_barrier(count).astype(jnp.int32), None

    zeros = jnp.zeros((a.shape[1], b.shape[2]), jnp.int32)
    return lax.scan(add, zeros, (a, b))[0]


def _words(a: jax.Array) -> jax.Array:
    """Joins the bytes of each row, four to a ``uint32``; the last word is filled with zeros."""
    a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % 4)))
    return lax.bitcast_convert_type(a.reshape(a.shape[0], -1, 4), jnp.uint32)


def _weigh_planes(counts: jax.Array) -> jax.Array:
    """``sum_i 2^i counts[i]``."""
    weights = jnp.int32(1) << jnp.arange(counts.shape[0], dtype=jnp.int32)
    return jnp.sum(counts * weights.reshape(-1, *[1] * (counts.ndim - 1)), axis=0)


def _block(entries: int) -> int:
    """How many samples of ``entries`` entries make a block."""
    return max(1, _BLOCK // entries)


IMPLEMENTATION = Implementation(
    "packed",
    {
        **XLA.kernels,
        "forward": Kernel(forward),
        "input_grad": Kernel(input_grad, declines_input_grad),
        "weight_grad": Kernel(weight_grad, declines_weight_grad),
    },
)
