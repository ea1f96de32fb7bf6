"""Keep probabilities by water-filling, and as whole numbers that can be summed exactly."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fqt_jax.binarize import check_float

_UNIT = 2.0**32


def keep_probabilities(importance: jax.Array, k: int | jax.Array) -> jax.Array:
    r"""Keep probabilities :math:`p_i = \min(1, c\, r_i)` that sum to ``k`` (water-filling).

    Groups of zero importance are dropped for certain unless fewer than ``k`` groups have any;
    then those all get one, and the rest of ``k`` is spread evenly over the others.

    Args:
      importance: ``r``, ``float[n]``, not negative.
      k: number of groups to keep, ``0 <= k <= n``.

    Returns:
      ``p``, ``float32[n]``, each in [0, 1]. NaN everywhere if the importance has a NaN.

    Raises:
      TypeError: ``importance`` is not a floating-point array.
      ValueError: ``importance`` is not one-dimensional, or ``k`` is outside 0..n.

    Example:
      >>> import jax.numpy as jnp
      >>> from fqt_jax import keep_probabilities
      >>> keep_probabilities(jnp.array([8.0, 1.0, 1.0, 2.0]), 2)
      Array([1.  , 0.25, 0.25, 0.5 ], dtype=float32)
    """
    check_float("importance", importance)
    if importance.ndim != 1:
        raise ValueError(f"importance must have one axis; got shape {importance.shape}.")
    n = importance.shape[0]
    if isinstance(k, int) and not 0 <= k <= n:
        raise ValueError(f"k must be from 0 to the number of groups, {n}; got {k}.")
    if n == 0:
        return importance.astype(jnp.float32)
    r = importance.astype(jnp.float32)
    ordered = -jnp.sort(-r)
    # In units of the k-th largest, so that no span of importance underflows where it matters.
    # What exceeds n such units is capped at one however large it is.
    unit = ordered[jnp.clip(jnp.asarray(k, jnp.int32) - 1, 0, n - 1)]
    unit = jnp.maximum(unit, jnp.float32(jnp.finfo(jnp.float32).tiny))
    r, ordered = (jnp.minimum(v / unit, jnp.float32(2 * n)) for v in (r, ordered))
    k = jnp.asarray(k, jnp.float32)
    tail = jnp.cumsum(ordered[::-1])[::-1]  # tail[m] = sum of all but the m largest
    m = jnp.arange(n, dtype=jnp.float32)
    # The m largest are capped at one, where m is the first count whose c = (k - m) / tail[m] caps
    # no further group.
    fits = (m < k) & ((k - m) * ordered <= tail)
    first = jnp.argmax(fits)
    c = (k - m[first]) / jnp.maximum(tail[first], jnp.float32(jnp.finfo(jnp.float32).tiny))
    p = jnp.minimum(1.0, c * r)
    positive = jnp.sum(r > 0, dtype=jnp.float32)
    spread = (k - positive) / jnp.maximum(n - positive, 1.0)
    p = jnp.where(positive <= k, jnp.where(r > 0, 1.0, spread), p)
    p = jnp.where(k == 0, 0.0, p)
    return jnp.where(jnp.isnan(tail[0]), jnp.nan, p).astype(jnp.float32)


class Units(NamedTuple):
    """Keep probabilities in units of 2^-32, so that sums of many small ones lose nothing.

    Attributes:
      certain: ``bool[n]``, where the probability is one.
      units: ``uint32[n]``, zero where it is certain.
      weights: ``float32[n]``, the inverse of the probability as it was rounded to units, which
        keeps the estimate unbiased. NaN where the probability is.
    """

    certain: jax.Array
    units: jax.Array
    weights: jax.Array

    @classmethod
    def of(cls, p: jax.Array) -> Units:
        """Rounds probabilities to units; those that are positive stay so."""
        certain = p >= 1
        units = jnp.where(certain, 0.0, p * _UNIT).astype(jnp.uint32)
        units = jnp.where((p > 0) & ~certain, jnp.maximum(units, 1), units)
        weights = jnp.where(certain, 1.0, _UNIT / jnp.maximum(units, 1).astype(jnp.float32))
        return cls(certain, units, jnp.where(jnp.isnan(p), jnp.nan, weights))
