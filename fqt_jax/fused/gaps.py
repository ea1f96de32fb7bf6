"""What stands between products, forward and backward, whatever norm there is."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fqt_jax import kernels
from fqt_jax.binarize import PackedBits
from fqt_jax.fused.line import line_of, normed_of, takes_moments, thresholds
from fqt_jax.fused.parts import Gap, GapParams, Running, Statistics
from fqt_jax.kernels import Flow, Line, Moments, Normed
from fqt_jax.sharding import mean_over

Function = Line | Normed
"""The coefficients of the function that a gap is of the sums before it."""


class GapGradient(NamedTuple):
    """Gradients of a gap's source, of its parameters and of the source's scale; and the minimum and
    maximum of the first, for each sample and channel.
    """

    source: jax.Array
    params: GapParams
    scale: jax.Array
    bounds: tuple[jax.Array, jax.Array]


def function_of(
    gap: Gap,
    params: GapParams,
    scale: jax.Array,
    source: jax.Array,
    running: Running | None,
    implementation: str | None,
) -> tuple[Function, Moments | None, Statistics | None]:
    """The function, the moments of its source and the statistics of the batch.

    The last two are those that a batch norm takes, ``None`` where none does.

    Args:
      gap, params: what stands there.
      scale: of the source, ``float32[C]``.
      source: the sums before it.
      running: the statistics that a batch norm holds.
      implementation: of the kernels.
    """
    if gap.norm == "layer":
        return normed_of(gap, params, scale), None, None
    moments = None
    if takes_moments(gap, running):
        rows = None if running is None else running.weights
        kink = thresholds(gap, params, scale)
        moments = kernels.moments(source, kink, rows, implementation=implementation)
        moments = mean_over(moments, gap.axes)
    line, of_batch = line_of(gap, params, scale, moments, running)
    return line, moments, of_batch


def encode(
    gap: Gap, source: jax.Array, function: Function, implementation: str | None
) -> tuple[PackedBits, PackedBits, jax.Array]:
    """Signs of the function, where it is within 1, and NaN for each sample that makes one."""
    if isinstance(function, Normed):
        return kernels.encode_normed(source, function, gap.epsilon, implementation=implementation)
    return kernels.encode(source, function, gap.pool, implementation=implementation)


def gap_gradient(
    gap: Gap,
    params: GapParams,
    scale: jax.Array,
    source: jax.Array,
    running: Running | None,
    moments: Moments | None,
    d: jax.Array,
    samples: jax.Array | None,
    implementation: str | None,
    *,
    overwrites: bool = False,
) -> GapGradient:
    """The backward pass of a gap.

    Args:
      gap, params, scale, source, running, moments: of the forward pass.
      d: gradient of the function, of the samples kept.
      samples: their indices; ``None`` for all.
      implementation: of the kernels.
      overwrites: whether nothing needs the source any more.
    """
    if gap.norm == "layer":
        normed, vjp = jax.vjp(lambda *at: normed_of(gap, *at), params, scale)
        g, lo, hi, sums = kernels.gradient_normed(
            source, normed, gap.epsilon, d, samples, implementation=implementation
        )
        d_params, d_scale = vjp(sums)
        return GapGradient(g, d_params, d_scale, (lo, hi))

    def line(params: GapParams, scale: jax.Array, moments: Moments | None) -> Line:
        return line_of(gap, params, scale, moments, running)[0]

    at, line_vjp = jax.vjp(line, params, scale, moments)
    d_params, d_scale, d_moments = line_vjp(
        kernels.gradient_sums(source, at, gap.pool, d, samples, implementation=implementation)
    )
    d_moments = mean_over(d_moments, gap.axes)  # of all devices' losses
    rows = None if running is None else running.weights
    g, lo, hi = kernels.gradient(
        source,
        at,
        _flow(d_moments, source),
        gap.pool,
        d,
        samples,
        rows if takes_moments(gap, running) else None,
        overwrites=overwrites,
        implementation=implementation,
    )
    return GapGradient(g, d_params, d_scale, (lo, hi))


def _flow(d_moments: Moments | None, source: jax.Array) -> Flow:
    """Each moment is a mean over all entries of ``s``, or of ``s^2``, on one side."""
    if d_moments is None:
        no = jnp.zeros(source.shape[3], jnp.float32)
        return Flow(no, no, no, no)
    n = jnp.float32(source.size // source.shape[3])
    return Flow(
        2 * d_moments.square1 / n,
        d_moments.mean1 / n,
        2 * d_moments.square0 / n,
        d_moments.mean0 / n,
    )
