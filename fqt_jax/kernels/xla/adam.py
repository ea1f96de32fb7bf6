"""Adam's moments, in plain XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def adam(
    g: jax.Array, m: jax.Array, v: jax.Array, factors: jax.Array, *, platform: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See :func:`fqt_jax.kernels.adam`."""
    wide = jnp.float64 if any(a.dtype == jnp.float64 for a in (g, m, v)) else jnp.float32
    of_g, of_m, of_g2, of_v, inverse1, inverse2, eps = factors.astype(wide)
    g_wide = g.astype(wide)
    m_new = of_g * g_wide + of_m * m.astype(wide)
    v_new = of_g2 * jnp.square(g_wide) + of_v * v.astype(wide)
    direction = (m_new * inverse1) / (jnp.sqrt(v_new * inverse2) + eps)
    return direction.astype(g.dtype), m_new.astype(m.dtype), v_new.astype(v.dtype)
