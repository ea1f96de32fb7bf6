"""The groups of a gradient that were kept: what samplers give and kernels take."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

GroupAxis = Literal["samples", "channels"]
"""The axis of a gradient whose entries at one index are a group."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["indices", "weights"], meta_fields=["size"]
)
@dataclasses.dataclass(frozen=True)
class Selection:
    """The groups that were kept.

    Attributes:
      indices: ``int32[k]``, distinct and increasing.
      weights: ``float32[k]``, what each kept group is multiplied by. A weight of zero marks a
        slot that is not used (the Bernoulli sampler keeps a random number of groups but shapes
        are static): that group counts as dropped.
      size: the number of groups drawn from; static.
    """

    indices: jax.Array
    weights: jax.Array
    size: int

    def expand(self) -> jax.Array:
        """The weight of every group, ``float32[size]``, zero where it was dropped."""
        return jnp.zeros(self.size, jnp.float32).at[self.indices].set(self.weights)
