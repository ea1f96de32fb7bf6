"""Uniform sampling: the control that shows what importance is worth."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fqt_jax.rounding import counter_bits
from fqt_jax.samplers.base import Float, Sampler
from fqt_jax.selection import Selection


@dataclasses.dataclass(frozen=True)
class Uniform(Sampler):
    """Keeps any ``k`` groups with the same probability, whatever their importance."""

    def probabilities(self, importance: jax.Array, k: int) -> jax.Array:
        """``k / n`` for each."""
        n = importance.shape[0]
        return jnp.full(n, k / max(n, 1), jnp.float32)

    def draw(self, p: jax.Array, k: int, seed: jax.Array) -> Selection:
        """One draw: the ``k`` smallest of ``n`` random words.

        Every subset is equally likely, up to ties of 32 bits.
        """
        n = p.shape[0]
        order = jnp.argsort(counter_bits(seed, jnp.arange(n, dtype=jnp.uint32)))
        indices = jnp.sort(order[:k]).astype(jnp.int32)
        return Selection(indices, jnp.full(k, n / max(k, 1), jnp.float32), n)

    def sum_variance(self, terms: Float, p: Float) -> float:
        """Exact, from the probability that two groups are kept together."""
        n, k = p.size, round(p.sum())
        both = k * (k - 1) / (n * (n - 1)) if n > 1 else 1.0
        squares = np.sum(terms**2)
        cross = np.sum(terms.sum(axis=0) ** 2) - squares
        return float((n / k - 1) * squares + (both / (k / n) ** 2 - 1) * cross)
