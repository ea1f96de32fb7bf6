"""Which groups of a gradient are kept, and on what grid their entries are rounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fqt_jax.kernels.contract import GroupAxis, Rounding
from fqt_jax.pruning import Selection, draw, group_importance, sum_of_squares
from fqt_jax.recipe import GradientQuantizer
from fqt_jax.rounding import clamp_range


def roundings(
    g: jax.Array,
    quantizer: GradientQuantizer,
    shared: bool,
    seeds: Sequence[jax.Array],
    bounds: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[Rounding, Rounding]:
    """What the kernels need to quantize ``g`` for the input and for the weight gradient.

    Everything follows from the minimum and maximum of each (sample, channel) pair, one pass over
    ``g``: groups of samples and of channels, folded weights or not, are reductions of those.

    Args:
      g: ``float32[N, H', W', O]``.
      quantizer: bits, keep, sampler, importance, groups.
      shared: whether the weight gradient uses the samples drawn for the input gradient.
      seeds: four of ``uint32[2]``: sample draw, channel draw, input rounding, weight rounding.
      bounds: those minima and maxima, ``float32[N, O]``, where they are known already.

    Returns:
      The :class:`Rounding` of the input gradient and that of the weight gradient.
    """
    n, _, _, o = g.shape
    lo, hi = bounds or (jnp.min(g, axis=(1, 2)), jnp.max(g, axis=(1, 2)))  # [N, O]
    largest = jnp.maximum(jnp.max(hi), -jnp.min(lo))

    def select(axis: int, seed: jax.Array) -> Selection | None:
        size = (n, o)[axis]
        k = quantizer.kept(size)
        if k == size:
            return None
        squares = None
        if quantizer.importance == "norm":
            reduced = tuple(a for a in range(4) if a != 3 * axis)
            squares = sum_of_squares(g, largest, reduced)
        importance = group_importance(
            lo.min(1 - axis), hi.max(1 - axis), squares, quantizer.sampler
        )
        return draw(importance, k, quantizer.sampler, seed)

    def rounding(
        axis: int, lo: jax.Array, hi: jax.Array, seed: jax.Array, kept: dict[str, Any]
    ) -> Rounding:
        if quantizer.groups == "tensor":
            lo, hi = (jnp.broadcast_to(v, a.shape) for v, a in ((lo.min(), lo), (hi.max(), hi)))
        groups: GroupAxis = "channels" if axis else "samples"
        own: Selection | None = kept[groups]
        if own is not None:
            lo, hi = lo[own.indices], hi[own.indices]
        value_range = clamp_range(hi - lo)
        return Rounding(lo, value_range, seed, bits=quantizer.bits, groups=groups, **kept)

    samples = select(0, seeds[0])
    only_samples = {"samples": samples, "channels": None}
    for_input = rounding(0, lo.min(1), hi.max(1), seeds[2], only_samples)
    if quantizer.groups == "sample":
        return for_input, rounding(0, lo.min(1), hi.max(1), seeds[3], only_samples)
    if not shared:
        only_channels = {"samples": None, "channels": select(1, seeds[1])}
        return for_input, rounding(1, lo.min(0), hi.max(0), seeds[3], only_channels)
    if samples is not None:
        # Multiplying by a positive weight commutes with min and max, exactly.
        weights = samples.weights.reshape(-1, 1)
        lo, hi = (a[samples.indices] for a in (lo, hi))
        # A dropped sample must not count, unless all are: then the range is that of nothing, zero.
        beyond = jnp.where(jnp.any(weights != 0), jnp.float32(jnp.inf), jnp.float32(0))
        lo = jnp.where(weights == 0, beyond, lo * weights)
        hi = jnp.where(weights == 0, -beyond, hi * weights)
    return for_input, rounding(1, lo.min(0), hi.max(0), seeds[3], only_samples)
