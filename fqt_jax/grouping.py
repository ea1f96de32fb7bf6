"""Which groups of a gradient are kept, and on what grid their entries are rounded."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fqt_jax.grids import GRIDS
from fqt_jax.importance import GroupStatistics, sum_of_squares
from fqt_jax.kernels.contract import Rounding
from fqt_jax.pruning import draw_groups
from fqt_jax.recipe import GradientQuantizer, Grouping
from fqt_jax.rounding import clamp_range
from fqt_jax.selection import GroupAxis, Selection

_AXES: dict[GroupAxis, int] = {"samples": 0, "channels": 1}
"""Of the minima and maxima of (sample, channel) pairs."""


def roundings(
    g: jax.Array,
    quantizer: GradientQuantizer,
    seeds: Sequence[jax.Array],
    bounds: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[Rounding, Rounding]:
    """What the kernels need to quantize ``g`` for the input and for the weight gradient.

    Everything follows from the minimum and maximum of each (sample, channel) pair, one pass over
    ``g``: groups of samples and of channels, folded weights or not, are reductions of those.

    Args:
      g: ``float32[N, H', W', O]``.
      quantizer: bits, keep, sampler, importance, groups, prune, grid.
      seeds: four of ``uint32[2]``: sample draw, channel draw, input rounding, weight rounding.
      bounds: those minima and maxima, ``float32[N, O]``, where they are known already.

    Returns:
      The :class:`Rounding` of the input gradient and that of the weight gradient.
    """
    lo, hi = bounds or (jnp.min(g, axis=(1, 2)), jnp.max(g, axis=(1, 2)))  # [N, O]

    @functools.cache
    def selection(pruned: GroupAxis) -> Selection | None:
        axis = _AXES[pruned]

        def squares() -> jax.Array:
            largest = jnp.maximum(jnp.max(hi), -jnp.min(lo))
            return sum_of_squares(g, largest, tuple(a for a in range(4) if a != 3 * axis))

        groups = GroupStatistics(lo.min(1 - axis), hi.max(1 - axis), squares)
        return draw_groups(groups, quantizer, seeds[axis])

    def rounding(grouping: Grouping, seed: jax.Array) -> Rounding:
        kept = selection(grouping.pruned)
        least, most = _bounds(lo, hi, grouping, kept)
        lowest, value_range = GRIDS[quantizer.grid](least, most, quantizer.bits)
        return Rounding(
            lowest,
            clamp_range(value_range),
            seed,
            samples=kept if grouping.pruned == "samples" else None,
            channels=kept if grouping.pruned == "channels" else None,
            bits=quantizer.bits,
            groups=grouping.scaled,
        )

    return (
        rounding(quantizer.grouping("input"), seeds[2]),
        rounding(quantizer.grouping("weight"), seeds[3]),
    )


def _bounds(
    lo: jax.Array, hi: jax.Array, grouping: Grouping, kept: Selection | None
) -> tuple[jax.Array, jax.Array]:
    """Minimum and maximum of what each scale is for, from those of (sample, channel) pairs."""
    folded = grouping.pruned != grouping.scaled
    if kept is not None and folded:
        lo, hi = _folded(lo, hi, _AXES[grouping.pruned], kept)
    reduced = 1 - _AXES[grouping.scaled]
    lo, hi = lo.min(reduced), hi.max(reduced)
    if grouping.one_scale:
        lo, hi = jnp.broadcast_to(lo.min(), lo.shape), jnp.broadcast_to(hi.max(), hi.shape)
    if kept is not None and not folded:
        lo, hi = lo[kept.indices], hi[kept.indices]
    return lo, hi


def _folded(
    lo: jax.Array, hi: jax.Array, axis: int, kept: Selection
) -> tuple[jax.Array, jax.Array]:
    """Those of what is kept, times its weight."""
    # Multiplying by a positive weight commutes with min and max, exactly.
    weights = jnp.expand_dims(kept.weights, 1 - axis)
    lo, hi = (jnp.take(a, kept.indices, axis=axis, mode="clip") for a in (lo, hi))
    # A dropped group must not count, unless all are: then the range is that of nothing, zero.
    beyond = jnp.where(jnp.any(weights != 0), jnp.float32(jnp.inf), jnp.float32(0))
    lo = jnp.where(weights == 0, beyond, lo * weights)
    hi = jnp.where(weights == 0, -beyond, hi * weights)
    return lo, hi
