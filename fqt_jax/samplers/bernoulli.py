"""Bernoulli sampling: each group is kept or dropped on its own."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fqt_jax.kernels import Units
from fqt_jax.rounding import counter_bits
from fqt_jax.samplers.base import Float, Sampler
from fqt_jax.selection import Selection


@dataclasses.dataclass(frozen=True)
class Bernoulli(Sampler):
    """Keeps each group independently of the others (the paper's text): ``k`` on average."""

    exact: ClassVar[bool] = False

    def draw(self, p: jax.Array, k: int, seed: jax.Array) -> Selection:
        """One draw: a slot for every group, of weight zero where it is dropped."""
        certain, units, weights = Units.of(p)
        every = jnp.arange(p.shape[0], dtype=jnp.int32)
        kept = certain | (counter_bits(seed, every.astype(jnp.uint32)) < units)
        return Selection(every, jnp.where(kept | jnp.isnan(p), weights, 0.0), p.shape[0])

    def sum_variance(self, terms: Float, p: Float) -> float:
        """Exact: the groups' own variances add up."""
        return float(np.sum((1 - p) * self.weights(p) * np.sum(terms**2, axis=1)))
