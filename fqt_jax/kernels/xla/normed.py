"""A layer norm before a product, in plain XLA: the reference."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fqt_jax.binarize import PackedBits
from fqt_jax.kernels.normed import Normed
from fqt_jax.kernels.transforms import Line
from fqt_jax.kernels.xla.transforms import is_up, line_at, row


class _Normalized(NamedTuple):
    """What is normalized, ``[N, H, W, C]``, and the inverse deviation, ``[N, H, W, 1]``."""

    x: jax.Array
    inverse: jax.Array


def encode_normed(
    source: jax.Array, normed: Normed, *, epsilon: float, platform: str
) -> tuple[PackedBits, PackedBits, jax.Array]:
    """See :func:`fqt_jax.kernels.encode_normed`."""
    t = evaluated_normed(source, normed, epsilon)
    is_nan = jnp.isnan(t).any((1, 2, 3))
    nan = jnp.where(is_nan, jnp.float32(jnp.nan), jnp.float32(0))
    return PackedBits.pack(t >= 0), PackedBits.pack(jnp.abs(t) <= 1), nan


def evaluated_normed(source: jax.Array, normed: Normed, epsilon: float) -> jax.Array:
    """``t``."""
    return line_at(_normalized(source, normed.before, epsilon).x, normed.after)


def gradient_normed(
    source: jax.Array,
    normed: Normed,
    d: jax.Array,
    samples: jax.Array | None,
    *,
    epsilon: float,
    platform: str,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See :func:`fqt_jax.kernels.gradient_normed`; sums in the order Q1, P1, Q0, P0 of both."""
    shape = source.shape
    if samples is not None:
        source = jnp.take(source, samples, axis=0, mode="clip")
    before, after = normed
    s = source.astype(jnp.float32)
    x, inverse = _normalized(source, before, epsilon)
    h = _slope(x, after) * d
    along = jnp.mean(h * x, -1, keepdims=True)
    e = inverse * (h - jnp.mean(h, -1, keepdims=True) - x * along)
    g = _slope(s, before) * e
    sums = jnp.stack([*_sums(x, after, d), *_sums(s, before, e)])
    if samples is not None:
        full = jnp.zeros(shape, jnp.float32)
        g = full.at[samples].set(g, unique_indices=True, mode="drop")
    return g, jnp.min(g, (1, 2)), jnp.max(g, (1, 2)), sums


def _normalized(source: jax.Array, before: Line, epsilon: float) -> _Normalized:
    a = line_at(source.astype(jnp.float32), before)
    centred = a - jnp.mean(a, -1, keepdims=True)
    variance = jnp.mean(centred * centred, -1, keepdims=True)
    inverse = lax.rsqrt(variance + jnp.float32(epsilon))
    return _Normalized(centred * inverse, inverse)


def _slope(v: jax.Array, line: Line) -> jax.Array:
    return jnp.where(is_up(v, line.s, line.t), row(line.p1), row(line.p0))


def _sums(v: jax.Array, line: Line, d: jax.Array) -> list[jax.Array]:
    up = is_up(v, line.s, line.t)
    sides = [jnp.where(side, d, jnp.float32(0)) for side in (up, ~up)]
    return [jnp.sum(jnp.sum(part, (1, 2)), 0) for side in sides for part in (side, side * v)]
