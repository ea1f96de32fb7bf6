"""Keep probabilities and draws, in plain XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fqt_jax.kernels.draws import Units

_TINY = float(np.finfo(np.float32).tiny)


def water_filling(importance: jax.Array, k: jax.Array, *, platform: str) -> jax.Array:
    """See :func:`fqt_jax.kernels.draws.water_filling`."""
    r, n = importance, importance.shape[0]
    if n == 0:
        return r
    rising = jnp.sort(r)
    # In units of the k-th largest, so that no span of importance underflows where it matters. What
    # exceeds n such units is capped at one however large it is.
    scale = inverse_power_of_two(rising[jnp.clip(n - k, 0, n - 1)])
    r, rising = (jnp.minimum(v * scale, jnp.float32(8 * n)) for v in (r, rising))
    k = k.astype(jnp.float32)
    # tail[m]: the sum of all but the m largest. The scan adds in one order on every platform.
    ordered, tail = rising[::-1], jax.lax.associative_scan(jnp.add, rising)[::-1]
    m = jnp.arange(n, dtype=jnp.float32)
    # The m largest are capped at one, where m is the first count whose c = (k - m) / tail[m] caps
    # no further group.
    first = jnp.argmax((m < k) & ((k - m) * ordered <= tail))
    c = (k - m[first]) / jnp.maximum(tail[first], jnp.float32(_TINY))
    p = jnp.minimum(1.0, c * r)
    positive = jnp.sum(r > 0, dtype=jnp.float32)
    spread = (k - positive) / jnp.maximum(n - positive, 1.0)
    p = jnp.where(positive <= k, jnp.where(r > 0, 1.0, spread), p)
    p = jnp.where(k == 0, 0.0, p)
    return jnp.where(jnp.isnan(tail[0]), jnp.nan, p).astype(jnp.float32)


def inverse_power_of_two(a: jax.Array) -> jax.Array:
    """The power of two that brings ``a > 0`` to [1, 2), or to [2, 4) if it were no normal number.

    A product with it is exact, where XLA divides by ``a`` in one way or another.
    """
    bits = jax.lax.bitcast_convert_type(jnp.maximum(a, jnp.float32(_TINY)), jnp.uint32)
    exponent = jnp.clip(254 - (bits >> 23).astype(jnp.int32), 1, 253)
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def systematic(
    p: jax.Array, seed: jax.Array, *, k: int, platform: str
) -> tuple[jax.Array, jax.Array]:
    """See :func:`fqt_jax.kernels.draws.systematic`."""
    certain, units, weights = Units.of(p)
    running = seed[0] + jnp.cumsum(units, dtype=jnp.uint32)
    kept = certain | (running < units)
    order = jnp.argsort(~kept, stable=True)[:k]
    indices = jnp.sort(order).astype(jnp.int32)
    selected = kept[indices] | jnp.isnan(p[indices])
    return indices, jnp.where(selected, weights[indices], 0.0)
