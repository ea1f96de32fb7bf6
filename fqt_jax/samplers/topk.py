"""The largest groups: the sampler of the paper's published code, which is none."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from fqt_jax.importance import GroupStatistics, Importance, largest_entry
from fqt_jax.samplers.base import Sampler
from fqt_jax.selection import Selection


@dataclasses.dataclass(frozen=True)
class TopK(Sampler):
    """Keeps the ``k`` groups with the largest entry as they are: nothing is drawn, hence biased."""

    rescales: ClassVar[bool] = False

    def measure(self, groups: GroupStatistics, importance: Importance) -> jax.Array:
        """``max(abs(g))`` of each group, whatever the importance."""
        return largest_entry(groups)

    def probabilities(self, importance: jax.Array, k: int) -> jax.Array:
        """One for the ``k`` largest, the first of equal ones, and zero for the others."""
        largest = jax.lax.top_k(importance, k)[1]
        return jnp.zeros(importance.shape[0], jnp.float32).at[largest].set(1.0)

    def draw(self, p: jax.Array, k: int, seed: jax.Array) -> Selection:
        """The groups whose probability is one."""
        (indices,) = jnp.nonzero(p > 0, size=k)
        return Selection(indices.astype(jnp.int32), jnp.ones(k, jnp.float32), p.shape[0])
