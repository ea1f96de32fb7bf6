"""Keep probabilities by water-filling."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fqt_jax import kernels
from fqt_jax.binarize import check_float
from fqt_jax.kernels.xla.draws import water_filling


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
    return _water_filling(importance.astype(jnp.float32), jnp.asarray(k, jnp.int32))


@jax.custom_jvp
def _water_filling(importance: jax.Array, k: jax.Array) -> jax.Array:
    return kernels.water_filling(importance, k)


@_water_filling.defjvp
def _water_filling_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """By XLA's own derivatives: a kernel has none."""
    (importance, k), (slope, _) = primals, tangents
    return jax.jvp(lambda r: water_filling(r, k, platform="any"), (importance,), (slope,))
