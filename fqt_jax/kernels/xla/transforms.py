"""What stands between two integer products, in plain XLA: the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fqt_jax.binarize import PackedBits
from fqt_jax.kernels.transforms import Flow, Line


def moments(
    source: jax.Array,
    thresholds: tuple[jax.Array, jax.Array],
    weights: jax.Array | None,
    *,
    platform: str,
) -> tuple[jax.Array, ...]:
    """See :func:`fqt_jax.kernels.moments`."""
    if source.size == 0:
        return (jnp.zeros(source.shape[3:], jnp.float32),) * 6
    s = source.astype(jnp.float32)
    rows = [jnp.ones_like(s), s, s * s]
    if weights is not None:
        rows = [each * weights.reshape(-1, 1, 1, 1) for each in rows]
    up = is_up(s, *thresholds)
    sides = [jnp.where(side, each, jnp.float32(0)) for side in (up, ~up) for each in rows]
    # Sample by sample: the sum of all squares at once would lose digits.
    return tuple(jnp.mean(jnp.mean(side, (1, 2)), 0) for side in sides)


def encode(
    source: jax.Array, line: Line, *, pool: int, platform: str
) -> tuple[PackedBits, PackedBits, jax.Array]:
    """See :func:`fqt_jax.kernels.encode`."""
    t = evaluated(source, line, pool)
    nan = jnp.zeros(source.shape[:1], jnp.float32)
    if jnp.issubdtype(source.dtype, jnp.floating):
        nan = jnp.where(jnp.isnan(t).any((1, 2, 3)), jnp.float32(jnp.nan), nan)
    return PackedBits.pack(t >= 0), PackedBits.pack(jnp.abs(t) <= 1), nan


def activate(
    source: jax.Array,
    line: Line,
    offsets: jax.Array | None,
    added: jax.Array | None,
    *,
    pool: int,
    platform: str,
) -> jax.Array:
    """See :func:`fqt_jax.kernels.activate`."""
    t = evaluated(source, line, pool)
    if offsets is not None:
        t = t + offsets.reshape(-1, 1, 1, 1)
    return t if added is None else t + added


def gradient_sums(
    source: jax.Array,
    line: Line,
    d: jax.Array,
    samples: jax.Array | None,
    *,
    pool: int,
    platform: str,
) -> tuple[jax.Array, ...]:
    """See :func:`fqt_jax.kernels.gradient_sums`; in the order Q1, P1, Q0, P0."""
    if samples is not None:
        source = jnp.take(source, samples, axis=0, mode="clip")
    s = source.astype(jnp.float32)
    up = is_up(s, line.s, line.t)
    d = _spread(_evaluated(source, line), d, pool)
    sides = (jnp.where(side, d, jnp.float32(0)) for side in (up, ~up))
    return tuple(jnp.sum(jnp.sum(part, (1, 2)), 0) for side in sides for part in (side, side * s))


def gradient(
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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See :func:`fqt_jax.kernels.gradient`."""
    if samples is not None:
        full = jnp.zeros((source.shape[0], *d.shape[1:]), jnp.float32)
        d = full.at[samples].set(d, unique_indices=True, mode="drop")
    s = source.astype(jnp.float32)
    d = _spread(_evaluated(source, line), d, pool)
    h1, k1, h0, k0 = ((each if weights is None else _outer(weights, each)) for each in flow)
    up = is_up(s, line.s, line.t)
    g = jnp.where(up, row(line.p1) * d + (row(h1) * s + row(k1)), 0.0)
    g = jnp.where(up, g, row(line.p0) * d + (row(h0) * s + row(k0)))
    return g, jnp.min(g, (1, 2)), jnp.max(g, (1, 2))


def encode_weights(w: jax.Array, *, platform: str) -> tuple[PackedBits, jax.Array]:
    """See :func:`fqt_jax.kernels.encode_weights`."""
    scale = jnp.zeros(w.shape[-1:], jnp.float32)
    if w.size:
        scale = jnp.mean(jnp.abs(w), axis=tuple(range(w.ndim - 1)))
    return PackedBits.pack(w >= 0, batch_ndim=0), scale


def finish_weight_grad(
    dw: jax.Array, w: jax.Array, d_scale: jax.Array, *, clip: bool, platform: str
) -> jax.Array:
    """See :func:`fqt_jax.kernels.finish_weight_grad`."""
    if clip:
        dw = jnp.where(jnp.abs(w) <= 1, dw, jnp.float32(0))
    return dw + jnp.sign(w) * d_scale.reshape((1,) * (w.ndim - 1) + (-1,))


def evaluated(source: jax.Array, line: Line, pool: int) -> jax.Array:
    """``t``, pooled."""
    return _pooled(_evaluated(source, line), pool)


def row(values: jax.Array) -> jax.Array:
    """``[C]`` or ``[N, C]`` along the channels of a source."""
    lead = (1,) * (2 - values.ndim)
    return values.reshape(*lead, *values.shape[:-1], 1, 1, values.shape[-1])


def _outer(weights: jax.Array, values: jax.Array) -> jax.Array:
    return weights.reshape(-1, 1) * values.reshape(1, -1)


def is_up(s: jax.Array, slope: jax.Array, offset: jax.Array) -> jax.Array:
    """Where an entry lies above the kink."""
    return row(slope) * s + row(offset) >= 0


def line_at(s: jax.Array, line: Line) -> jax.Array:
    """The function at ``float32[N, H, W, C]``."""
    up = row(line.p1) * s + row(line.q1)
    down = row(line.p0) * s + row(line.q0)
    return jnp.where(is_up(s, line.s, line.t), up, down)


def _evaluated(source: jax.Array, line: Line) -> jax.Array:
    """``t`` before pooling."""
    return line_at(source.astype(jnp.float32), line)


def _windows(t: jax.Array, pool: int) -> jax.Array:
    """``[N, H', pool, W', pool, C]``; a remainder is left out."""
    n, h, w, c = t.shape
    t = t[:, : h - h % pool, : w - w % pool]
    return t.reshape(n, h // pool, pool, w // pool, pool, c)


def _pooled(t: jax.Array, pool: int) -> jax.Array:
    return t if pool == 1 else _first_maximum(_windows(t, pool), pool)[0]


def _first_maximum(windows: jax.Array, pool: int) -> tuple[jax.Array, jax.Array]:
    """The maximum of each window, and the number of the first entry that attains it."""
    best = windows[:, :, 0, :, 0]
    place = jnp.zeros(best.shape, jnp.uint8)
    for i in range(1, pool * pool):
        entry = windows[:, :, i // pool, :, i % pool]
        is_more = (entry > best) | jnp.isnan(entry)
        best = jnp.where(is_more, entry, best)
        place = jnp.where(is_more, jnp.uint8(i), place)
    return best, place


def _spread(t: jax.Array, d: jax.Array, pool: int) -> jax.Array:
    """The gradient of ``t`` before pooling, from ``d`` after it."""
    if pool == 1:
        return d
    n, h, w, c = t.shape
    place = _first_maximum(_windows(t, pool), pool)[1]
    order = jnp.arange(pool * pool, dtype=jnp.uint8).reshape(1, 1, pool, 1, pool, 1)
    spread = jnp.where(place[:, :, None, :, None] == order, d[:, :, None, :, None], 0.0)
    spread = spread.reshape(n, h // pool * pool, w // pool * pool, c)
    return jnp.pad(spread, ((0, 0), (0, h % pool), (0, w % pool), (0, 0)))
