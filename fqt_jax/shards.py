"""What a training step does apart on each device of a mesh, and what it brings together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fqt_jax.estimators.base import SplitModel
from fqt_jax.mesh import Axes
from fqt_jax.metrics import Metrics

Statistics = Literal["synchronized", "local"]
"""What batch norms normalize a shard with: the whole batch's statistics, or the shard's own."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One device's part in a step. Without axes it is the only one, and nothing is changed.

    Attributes:
      axes: of the mesh, inside of :func:`jax.shard_map` over all of them; or ``None``.
      statistics: of batch norms.
    """

    axes: Axes | None = None
    statistics: Statistics = "synchronized"

    def own(self, key: jax.Array) -> jax.Array:
        """A key of this shard's own, from one that all have."""
        return key if self.axes is None else jax.random.fold_in(key, lax.axis_index(self.axes))

    def model(self, model: SplitModel) -> SplitModel:
        """The model as it runs here: with random streams of its own, and norms that meet others."""
        if self.axes is None:
            return model
        others = jax.tree.map(lambda a: self.own(a) if _is_key(a) else a, model.others)
        graphdef = model.graphdef
        if self.statistics == "synchronized":
            merged = model.merge()
            for _, module in nnx.iter_modules(merged):
                if isinstance(module, nnx.BatchNorm) and module.axis_name is None:
                    module.axis_name = self.axes
            graphdef = nnx.split(merged, nnx.Param, ...)[0]
        return model._replace(graphdef=graphdef, others=others, axes=self.axes)

    def agreed(self, before: Any, after: Any) -> Any:
        """What of a model's other state all devices go on with.

        The random streams go on from their own keys, which are the same everywhere; what else is
        floating-point, such as batch statistics, is the mean of all devices'.

        Args:
          before: the state before the step, the same on all devices.
          after: this device's after it.
        """
        axes = self.axes
        if axes is None:
            return after

        def agree(old: jax.Array, new: jax.Array) -> jax.Array:
            if _is_key(new):
                return old
            if jnp.issubdtype(new.dtype, jnp.inexact):
                # The mean of the changes, so that what does not change stays as it is.
                return old + lax.pmean(new - old, axes)
            return new

        return jax.tree.map(agree, before, after)

    def added(self, sums: Metrics, values: Mapping[str, Any], valid: Any = None) -> Metrics:
        """Running sums with those of all devices' values added; see :meth:`Metrics.add`."""
        if self.axes is None:
            return sums.add(values, valid)
        mine = jax.tree.map(jnp.zeros_like, sums).add(values, valid)
        return jax.tree.map(jnp.add, sums, lax.psum(mine, self.axes))

    def mean(self, tree: Any) -> Any:
        """The mean of all devices'."""
        return tree if self.axes is None else lax.pmean(tree, self.axes)


def _is_key(array: jax.Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jax.dtypes.prng_key))
