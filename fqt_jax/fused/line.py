"""The function that a gap is of the integer sums before it: its coefficients.

With ``y = scale s + bias``, a norm, and an activation ``act`` of two slopes, the function is
``act(gamma (y - mean) / deviation + beta)`` or, the other way round,
``gamma (act(y) - mean) / deviation + beta``. Both are linear on either side of one kink. A
threshold of the signs moves and scales both lines alike.

A layer norm takes its statistics of each position, so that the function is one of all channels
there: a line before the norm, with scale, bias and the activation where that comes first, and one
after it (:mod:`fqt_jax.kernels.normed`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fqt_jax.fused.parts import Gap, GapParams, Running, Statistics
from fqt_jax.kernels import Line, Moments, Normed
from fqt_jax.norms import with_gradient_of

_TINY = float(np.finfo(np.float32).tiny)


def kinks_before_norm(gap: Gap) -> bool:
    """Whether the activation comes first and a norm follows it."""
    return gap.norm is not None and gap.order == "act_norm"


def takes_moments(gap: Gap, running: Running | None) -> bool:
    """Whether a batch norm needs moments of its source, for statistics or their gradient."""
    if gap.norm != "batch":
        return False
    return not gap.uses_running or (running is not None and running.weights is not None)


def thresholds(gap: Gap, params: GapParams, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``S`` and ``T`` of the kink of a gap's activation, where that comes before the norm."""
    if not kinks_before_norm(gap):
        return jnp.ones_like(scale), jnp.zeros_like(scale)
    return scale, _above(gap, jnp.zeros_like(scale) if params.bias is None else params.bias)


def line_of(
    gap: Gap,
    params: GapParams,
    scale: jax.Array,
    moments: Moments | None,
    running: Running | None,
) -> tuple[Line, Statistics | None]:
    """The function's coefficients, and the statistics of the batch where the norm takes those.

    Args:
      gap, params: the norm and the activation.
      scale: of the integer sums, ``float32[C]``.
      moments: of the source, at :func:`thresholds`, where :func:`takes_moments`.
      running: the norm's statistics.
    """
    params = _in_float32(params)
    line, statistics = _activated(gap, params, scale, moments, running)
    return _centred(line, params), statistics


def normed_of(gap: Gap, params: GapParams, scale: jax.Array) -> Normed:
    """The coefficients of a gap with a layer norm.

    Args:
      gap, params: the norm and the activation.
      scale: of the integer sums, ``float32[C]``.
    """
    params = _in_float32(params)
    one, zero = jnp.ones_like(scale), jnp.zeros_like(scale)
    slope = _slope(gap, params)
    bias = zero if params.bias is None else params.bias
    gamma = one if params.gamma is None else params.gamma
    beta = zero if params.beta is None else params.beta
    is_first = gap.order == "act_norm"
    before = _act(gap, scale, bias, slope if is_first else None)
    after = _act(gap, gamma, beta, None if is_first else slope)
    return Normed(before, _centred(after, params))


def _in_float32(params: GapParams) -> GapParams:
    return GapParams(*(None if p is None else p.astype(jnp.float32) for p in params))


def _slope(gap: Gap, params: GapParams) -> jax.Array | None:
    """Of the activation where its input is negative; ``None`` where there is none."""
    if gap.slope == 1:
        return None
    return params.slope if gap.slope is None else jnp.float32(gap.slope)


def _act(gap: Gap, factor: jax.Array, offset: jax.Array, slope: jax.Array | None) -> Line:
    """``factor s + offset``, and the activation of it where there is a slope."""
    if slope is not None:
        return _kinked(gap, factor, offset, slope)
    return Line(jnp.ones_like(factor), jnp.zeros_like(factor), factor, offset, factor, offset)


def _centred(line: Line, params: GapParams) -> Line:
    """What the signs are of, where there is a threshold."""
    if params.threshold is None or params.spread is None:
        return line
    factor = 1 / params.spread
    q1, q0 = ((q - params.threshold) * factor for q in (line.q1, line.q0))
    return line._replace(p1=line.p1 * factor, q1=q1, p0=line.p0 * factor, q0=q0)


def _activated(
    gap: Gap,
    params: GapParams,
    scale: jax.Array,
    moments: Moments | None,
    running: Running | None,
) -> tuple[Line, Statistics | None]:
    """The function of norm and activation alone."""
    one, zero = jnp.ones_like(scale), jnp.zeros_like(scale)
    slope = _slope(gap, params)
    bias = params.bias
    if gap.norm is None:
        return _act(gap, scale, zero if bias is None else bias, slope), None
    assert running is not None
    if not kinks_before_norm(gap) or slope is None:
        mean, var, statistics = _statistics(gap, scale, scale, None, None, moments, running, bias)
        factor = (one if params.gamma is None else params.gamma) * lax.rsqrt(
            var + jnp.float32(gap.epsilon)
        )
        offset = (zero if params.beta is None else params.beta) - factor * mean
        return _act(gap, factor * scale, offset, slope), statistics
    up, down = scale, slope * scale
    up_offset, down_offset = (None, None) if bias is None else (bias, slope * bias)
    mean, var, statistics = _statistics(
        gap, up, down, up_offset, down_offset, moments, running, None
    )
    factor = (one if params.gamma is None else params.gamma) * lax.rsqrt(
        var + jnp.float32(gap.epsilon)
    )
    offset = (zero if params.beta is None else params.beta) - factor * mean
    above, below = (offset if b is None else factor * b + offset for b in (up_offset, down_offset))
    kink = thresholds(gap, params, scale)
    return Line(*kink, factor * up, above, factor * down, below), statistics


def _kinked(gap: Gap, factor: jax.Array, offset: jax.Array, slope: jax.Array) -> Line:
    """The activation of ``factor s + offset``."""
    return Line(factor, _above(gap, offset), factor, offset, slope * factor, slope * offset)


def _above(gap: Gap, offset: jax.Array) -> jax.Array:
    """The offset of the kink: with zero below it, only what is positive lies above."""
    return offset - jnp.float32(_TINY) if gap.zero_is_below else offset


def _statistics(
    gap: Gap,
    up: jax.Array,
    down: jax.Array,
    up_offset: jax.Array | None,
    down_offset: jax.Array | None,
    moments: Moments | None,
    running: Running,
    shift: jax.Array | None,
) -> tuple[jax.Array, jax.Array, Statistics | None]:
    """Mean and variance that the norm takes, and those of the batch if it takes them.

    Of ``up s + up_offset`` on one side of the kink and ``down s + down_offset`` on the other. A
    ``shift`` of both sides moves the mean alone: the mean returned is without it.
    """
    mean, var = running.mean, running.var
    if shift is not None:
        mean = mean - shift
    if moments is None:
        return mean, var, None
    batch_mean = up * moments.mean1 + down * moments.mean0
    square = up * up * moments.square1 + down * down * moments.square0
    if up_offset is not None and down_offset is not None:
        shares = up_offset * moments.share1, down_offset * moments.share0
        square = square + 2 * (up * up_offset * moments.mean1 + down * down_offset * moments.mean0)
        square = square + up_offset * shares[0] + down_offset * shares[1]
        batch_mean = batch_mean + shares[0] + shares[1]
    if gap.uses_running:
        # The mean of (y - mean)^2, but for what does not depend on the rows.
        var = with_gradient_of(var, square - 2 * mean * batch_mean)
        return with_gradient_of(mean, batch_mean), var, None
    var = jnp.maximum(square - batch_mean * batch_mean, jnp.float32(0))
    shifted = batch_mean if shift is None else batch_mean + shift
    return batch_mean, var, Statistics(shifted, var)
