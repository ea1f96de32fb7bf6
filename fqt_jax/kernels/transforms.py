r"""What stands between two integer products: norm, activation and pooling in one function.

It is a function of each entry ``s`` of the integer sums, linear on either side of a kink
(:class:`Line`), so that it can be evaluated wherever it is needed and never kept::

    t = P1 s + Q1  where  S s + T >= 0,  else  P0 s + Q0         then the maximum over windows
    g = P d + H s + K                                            with d the gradient of t

``P``, ``H`` and ``K`` are those of the same side; ``H s + K`` is what flows through the statistics
of a norm. Sources are ``int16``, ``int32`` or ``float32``, ``[N, H, W, C]``. What does not fit
together raises ``ValueError``, and a source of another type ``TypeError``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fqt_jax.binarize import WORD_BITS, PackedBits
from fqt_jax.kernels.contract import check_floats, check_kept, check_source
from fqt_jax.kernels.dispatch import dispatch


class Line(NamedTuple):
    """Coefficients of the function, ``float32[C]`` each; see the module's docstring."""

    s: jax.Array
    t: jax.Array
    p1: jax.Array
    q1: jax.Array
    p0: jax.Array
    q0: jax.Array


class Flow(NamedTuple):
    """What flows back through statistics, ``float32[C]`` each: ``H s + K`` on either side."""

    h1: jax.Array
    k1: jax.Array
    h0: jax.Array
    k0: jax.Array


class Moments(NamedTuple):
    """Means over samples and positions, ``float32[C]`` each, of either side of a kink.

    Of 1, ``s`` and ``s^2`` where ``S s + T >= 0``, then of the same where it is not; entries of
    the other side count as zero.
    """

    share1: jax.Array
    mean1: jax.Array
    square1: jax.Array
    share0: jax.Array
    mean0: jax.Array
    square0: jax.Array


def moments(
    source: jax.Array,
    thresholds: tuple[jax.Array, jax.Array],
    weights: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> Moments:
    """Moments of the source on either side of a kink.

    Args:
      source: the source.
      thresholds: ``S`` and ``T`` of the kink, ``float32[C]`` each.
      weights: by how much each sample counts, ``float32[N]``; ``None`` for one. The sum is divided
        by the number of samples, whatever the weights come to. Those of no samples are zero.
      implementation: name of the implementation; ``None`` picks one.
    """
    check_source(source)
    check_floats(source.shape[3:], S=thresholds[0], T=thresholds[1])
    check_floats(source.shape[:1], weights=weights)
    row: Any = jax.ShapeDtypeStruct(source.shape[3:], jnp.float32)
    return dispatch(
        "moments",
        Moments(*[row] * 6),
        source,
        thresholds,
        weights,
        implementation=implementation,
    )


def encode(
    source: jax.Array, line: Line, pool: int, *, implementation: str | None = None
) -> tuple[PackedBits, PackedBits, jax.Array]:
    """Signs of ``t``, where ``|t| <= 1``, and for each sample NaN if a float source makes one."""
    _check_function(source, line, pool)
    types = encoded_types(pooled_shape(source.shape, pool))
    return dispatch("encode", types, source, line, pool=pool, implementation=implementation)


def encoded_types(shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Types of the signs, of the mask and of each sample's NaN, for ``t`` of ``[N, H, W, C]``."""
    n, *each = shape
    words = jax.ShapeDtypeStruct((n, -(-math.prod(each) // WORD_BITS)), jnp.uint32)
    bits = PackedBits(words, tuple(each))  # type: ignore[arg-type]
    return bits, bits, jax.ShapeDtypeStruct((n,), jnp.float32)


def activate(
    source: jax.Array,
    line: Line,
    pool: int,
    offsets: jax.Array | None = None,
    added: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """``t``, ``float32[N, H // pool, W // pool, C]``, and what is added to it.

    Args:
      source, line, pool: of the function.
      offsets: added to all entries of a sample, ``float32[N]``.
      added: ``float32`` of the shape of the result.
      implementation: name of the implementation; ``None`` picks one.
    """
    _check_function(source, line, pool)
    shape = pooled_shape(source.shape, pool)
    check_floats(source.shape[:1], offsets=offsets)
    check_floats(shape, added=added)
    out = jax.ShapeDtypeStruct(shape, jnp.float32)
    return dispatch(
        "activate",
        out,
        source,
        line,
        offsets,
        added,
        pool=pool,
        implementation=implementation,
    )


def gradient_sums(
    source: jax.Array,
    line: Line,
    pool: int,
    d: jax.Array,
    samples: jax.Array | None,
    *,
    implementation: str | None = None,
) -> Line:
    """Gradients of the line's coefficients, sums over samples and positions.

    Those of ``S`` and ``T`` are zero: the function is continuous.

    Args:
      source, line, pool: of the forward pass.
      d: gradient of ``t``, of the samples kept.
      samples: their indices, increasing; ``None`` for all.
      implementation: name of the implementation; ``None`` picks one.
    """
    _check_gradient(source, line, pool, d, samples)
    row = jax.ShapeDtypeStruct(source.shape[3:], jnp.float32)
    q1, p1, q0, p0 = dispatch(
        "gradient_sums",
        (row,) * 4,
        source,
        line,
        d,
        samples,
        pool=pool,
        implementation=implementation,
    )
    no = jnp.zeros_like(q1)
    return Line(no, no, p1=p1, q1=q1, p0=p0, q0=q0)


def gradient(
    source: jax.Array,
    line: Line,
    flow: Flow,
    pool: int,
    d: jax.Array,
    samples: jax.Array | None,
    weights: jax.Array | None = None,
    *,
    overwrites: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``g``, and its minimum and maximum for each sample and channel, ``float32[N, C]``.

    The gradient of a window's maximum goes to the first entry that attains it. The flow into a
    sample is multiplied by its weight, that of :func:`moments`. With ``overwrites`` it may take the
    place of a float source in memory: for one that nothing else needs, or else it is copied first.
    """
    _check_gradient(source, line, pool, d, samples)
    check_floats(source.shape[3:], **flow._asdict())
    check_floats(source.shape[:1], weights=weights)
    n, _, _, c = source.shape
    bounds = jax.ShapeDtypeStruct((n, c), jnp.float32)
    return dispatch(
        "gradient",
        (jax.ShapeDtypeStruct(source.shape, jnp.float32), bounds, bounds),
        source,
        line,
        flow,
        d,
        samples,
        weights,
        pool=pool,
        overwrites=overwrites,
        implementation=implementation,
    )


def encode_weights(
    w: jax.Array, *, implementation: str | None = None
) -> tuple[PackedBits, jax.Array]:
    """Signs of ``float32[..., O]``, and the mean of ``|w|`` in each output channel.

    The mean of no weights is zero.
    """
    _check_weights(w)
    words = jax.ShapeDtypeStruct((-(-w.size // WORD_BITS),), jnp.uint32)
    signs = PackedBits(words, w.shape)  # type: ignore[arg-type]
    scale = jax.ShapeDtypeStruct((w.shape[-1],), jnp.float32)
    return dispatch("encode_weights", (signs, scale), w, implementation=implementation)


def finish_weight_grad(
    dw: jax.Array,
    w: jax.Array,
    d_scale: jax.Array,
    *,
    clip: bool,
    implementation: str | None = None,
) -> jax.Array:
    """``[|w| <= 1] dw + sign(w) d_scale``, in the memory of ``dw`` where that can be.

    Args:
      dw: gradient with respect to the signs, ``float32[..., O]``.
      w: the weights, of its shape.
      d_scale: ``float32[O]``.
      clip: whether the straight-through gradient is cut off; ``False`` leaves out the mask.
      implementation: name of the implementation; ``None`` picks one.
    """
    _check_weights(w)
    check_floats(w.shape, dw=dw)
    check_floats(w.shape[-1:], d_scale=d_scale)
    out = jax.ShapeDtypeStruct(w.shape, jnp.float32)
    return dispatch(
        "finish_weight_grad", out, dw, w, d_scale, clip=clip, implementation=implementation
    )


def pooled_shape(shape: tuple[int, ...], pool: int) -> tuple[int, ...]:
    """Shape of ``t``."""
    return shape[0], shape[1] // pool, shape[2] // pool, shape[3]


def _check_function(source: jax.Array, line: Line, pool: int) -> None:
    check_source(source, pool)
    check_floats(source.shape[3:], **line._asdict())


def _check_gradient(
    source: jax.Array, line: Line, pool: int, d: jax.Array, samples: jax.Array | None
) -> None:
    _check_function(source, line, pool)
    kept = check_kept(samples, source.shape[0])
    check_floats((kept, *pooled_shape(source.shape, pool)[1:]), d=d)


def _check_weights(w: jax.Array) -> None:
    if w.ndim == 0:
        raise ValueError("weights must have an axis of output channels; got a number.")
    check_floats(w.shape, w=w)
