"""Which groups are kept: probabilities in proportion to importance, and a systematic draw.

Both are small and full of steps that wait for one another: sorts, running sums, gathers. Compiled
one by one they take longer to compile, and in a small net longer to run, than what they choose
from. All implementations give the same bits on CPUs: sums of floats have one order, and the draw
is one of whole numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fqt_jax.kernels.dispatch import dispatch
from fqt_jax.selection import Selection

_UNIT = 2.0**32


class Units(NamedTuple):
    """Keep probabilities in units of 2^-32, so that sums of many small ones lose nothing.

    Attributes:
      certain: ``bool[n]``, where the probability is one.
      units: ``uint32[n]``, zero where it is certain, and where it is NaN.
      weights: ``float32[n]``, the inverse of the probability as it was rounded to units, which
        keeps the estimate unbiased. NaN where the probability is.
    """

    certain: jax.Array
    units: jax.Array
    weights: jax.Array

    @classmethod
    def of(cls, p: jax.Array) -> Units:
        """Rounds probabilities to units; those that are positive stay so."""
        certain, uncertain = p >= 1, (p > 0) & (p < 1)
        units = (jnp.where(uncertain, p, 0.0) * _UNIT).astype(jnp.uint32)
        units = jnp.where(uncertain, jnp.maximum(units, 1), units)
        weights = jnp.where(certain, 1.0, _UNIT / jnp.maximum(units, 1).astype(jnp.float32))
        return cls(certain, units, jnp.where(jnp.isnan(p), jnp.nan, weights))


def water_filling(
    importance: jax.Array, k: int | jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Keep probabilities; see :func:`fqt_jax.keep_probabilities`.

    Args:
      importance: ``float32[n]``, not negative.
      k: how many groups are kept, at most ``n``.
      implementation: who computes it; ``None`` picks one.

    Raises:
      ValueError: the importance is not ``float32[n]``.
    """
    _check_vector("importance", importance)
    out = jax.ShapeDtypeStruct(importance.shape, jnp.float32)
    k = jnp.asarray(k, jnp.int32)
    return dispatch("water_filling", out, importance, k, implementation=implementation)


def systematic(
    p: jax.Array, k: int, seed: jax.Array, *, implementation: str | None = None
) -> Selection:
    """One systematic draw of ``k`` groups; see :class:`fqt_jax.samplers.Systematic`.

    With ``units`` and ``weights`` those of :class:`Units`, group ``i`` is kept where it is certain
    or the running sum ``seed[0] + units[0] + ... + units[i]``, modulo 2^32, wraps around within it.
    Of more than ``k`` such groups the first are kept; where there are fewer, the first of the
    others fill up the slots, with weight zero, or NaN where the probability is.

    Args:
      p: keep probabilities, ``float32[n]``.
      k: their sum; static.
      seed: ``uint32[2]``.
      implementation: who computes it; ``None`` picks one.

    Raises:
      ValueError: an operand has another shape or type, or ``k`` is outside 0..n.
    """
    _check_vector("p", p)
    n = p.shape[0]
    if not 0 <= k <= n:
        raise ValueError(f"k must be from 0 to the number of groups, {n}; got {k}.")
    if seed.shape != (2,) or seed.dtype != jnp.uint32:
        raise ValueError(f"seed must be uint32[2]; got {seed.dtype}{list(seed.shape)}.")
    types = jax.ShapeDtypeStruct((k,), jnp.int32), jax.ShapeDtypeStruct((k,), jnp.float32)
    indices, weights = dispatch("systematic", types, p, seed, implementation=implementation, k=k)
    return Selection(indices, weights, n)


def _check_vector(name: str, a: jax.Array) -> None:
    if a.ndim != 1 or a.dtype != jnp.float32:
        raise ValueError(f"{name} must be float32[n]; got {a.dtype}{list(a.shape)}.")
