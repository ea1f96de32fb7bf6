r"""A layer norm before a product, with the functions on either side of it.

Both are those of :mod:`fqt_jax.kernels.transforms`, linear on either side of a kink: ``before`` of
the source ``s`` and ``after`` of what is normalized. With :math:`r = 1/\sqrt{v + \epsilon}`, mean
and variance ``v`` over the channels of a position, and ``d`` the gradient of ``t``::

    a = before(s)      x = (a - mean(a)) r                     t = after(x)
    h = after'(x) d    e = r (h - mean(h) - x mean(h x))       g = before'(s) e

Sources are ``int16``, ``int32`` or ``float32``, ``[N, H, W, C]``. Nothing but ``s`` need be kept.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fqt_jax.binarize import PackedBits
from fqt_jax.kernels.contract import check_floats, check_kept, check_source
from fqt_jax.kernels.dispatch import dispatch
from fqt_jax.kernels.transforms import Line, encoded_types


class Normed(NamedTuple):
    """The functions before and after a layer norm; see the module's docstring."""

    before: Line
    after: Line


def encode_normed(
    source: jax.Array, normed: Normed, epsilon: float, *, implementation: str | None = None
) -> tuple[PackedBits, PackedBits, jax.Array]:
    """Signs of ``t``, where ``|t| <= 1``, and for each sample NaN if there is one in ``t``."""
    _check(source, normed, epsilon)
    return dispatch(
        "encode_normed",
        encoded_types(source.shape),
        source,
        normed,
        epsilon=float(epsilon),
        implementation=implementation,
    )


def gradient_normed(
    source: jax.Array,
    normed: Normed,
    epsilon: float,
    d: jax.Array,
    samples: jax.Array | None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, Normed]:
    """The gradient of the source, its bounds, and the gradients of the coefficients.

    Args:
      source, normed, epsilon: of the forward pass.
      d: gradient of ``t``, of the samples kept.
      samples: their indices, increasing; ``None`` for all. Of all others ``g`` is zero.
      implementation: name of the implementation; ``None`` picks one.

    Returns:
      ``g``; its minimum and maximum for each sample and channel, ``float32[N, C]``; and sums over
      samples and positions for the coefficients, of which those of ``S`` and ``T`` are zero: the
      functions are continuous.
    """
    _check(source, normed, epsilon)
    n, *shape = source.shape
    check_floats((check_kept(samples, n), *shape), d=d)
    bounds = jax.ShapeDtypeStruct((n, shape[-1]), jnp.float32)
    sums = jax.ShapeDtypeStruct((8, shape[-1]), jnp.float32)
    g, lo, hi, sums = dispatch(
        "gradient_normed",
        (jax.ShapeDtypeStruct(source.shape, jnp.float32), bounds, bounds, sums),
        source,
        normed,
        d,
        samples,
        epsilon=float(epsilon),
        implementation=implementation,
    )
    no = jnp.zeros_like(sums[0])
    after, before = (
        Line(no, no, p1=p1, q1=q1, p0=p0, q0=q0) for q1, p1, q0, p0 in (sums[:4], sums[4:])
    )
    return g, lo, hi, Normed(before, after)


def _check(source: jax.Array, normed: Normed, epsilon: float) -> None:
    check_source(source)
    for line in normed:
        check_floats(source.shape[3:], **line._asdict())
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be a number from 0 on; got {epsilon}.")
