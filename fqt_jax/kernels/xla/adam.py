"""Adam's moments, in plain XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def adam(
    g: jax.Array, m: jax.Array, v: jax.Array, factors: jax.Array, *, platform: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See :func:`fqt_jax.kernels.adam`."""
    of_g, of_m, of_g2, of_v, inverse1, inverse2, eps = factors
    m32 = of_g * g + of_m * m
    v32 = of_g2 * jnp.square(g) + of_v * v
    direction = (m32 * inverse1) / (jnp.sqrt(v32 * inverse2) + eps)
    return direction.astype(g.dtype), m32.astype(m.dtype), v32.astype(v.dtype)
