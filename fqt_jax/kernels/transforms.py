r"""What stands between two integer products, on the native kernels: norm, activation and pooling.

All of it is one function of each entry ``s`` of the integer sums, linear on either side of a kink
(:class:`Line`), so that it can be evaluated wherever it is needed and never kept::

    t = P1 s + Q1  where  S s + T >= 0,  else  P0 s + Q0         then the maximum over windows
    g = P d + H s + K                                            with d the gradient of t

``P``, ``H`` and ``K`` are those of the same side; ``H s + K`` is what flows through the statistics
of a norm. Sources are ``int16``, ``int32`` or ``float32``, ``[N, H, W, C]``, and not empty.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fqt_jax.binarize import WORD_BITS, PackedBits
from fqt_jax.kernels import native


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


def moments(source: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Means over samples and positions, ``float32[4, C]``.

    Of ``s`` and of ``s^2`` where ``s >= 0``, then of both where it is not; entries of the other
    side count as zero.

    Args:
      source: the source.
      weights: by how much each sample counts, ``float32[N]``; ``None`` for one. The sum is divided
        by the number of samples, whatever the weights come to.
    """
    out = jax.ShapeDtypeStruct((4, source.shape[3]), jnp.float32)
    return native.call("moments", out, source, _weights(weights))


def encode(source: jax.Array, line: Line, pool: int) -> tuple[PackedBits, PackedBits, jax.Array]:
    """Signs of ``t``, where ``|t| <= 1``, and for each sample NaN if a float source makes one."""
    n, *shape = pooled_shape(source.shape, pool)
    words = jax.ShapeDtypeStruct((n, -(-math.prod(shape) // WORD_BITS)), jnp.uint32)
    nan = jax.ShapeDtypeStruct((n,), jnp.float32)
    signs, clip, nan = native.call(
        "encode", (words, words, nan), source, jnp.stack(line), pool=np.int64(pool)
    )
    return PackedBits(signs, tuple(shape)), PackedBits(clip, tuple(shape)), nan


def activate(
    source: jax.Array,
    line: Line,
    pool: int,
    offsets: jax.Array | None = None,
    added: jax.Array | None = None,
) -> jax.Array:
    """``t``, ``float32[N, H // pool, W // pool, C]``, and what is added to it.

    Args:
      source, line, pool: of the function.
      offsets: added to all entries of a sample, ``float32[N]``.
      added: ``float32`` of the shape of the result.
    """
    out = jax.ShapeDtypeStruct(pooled_shape(source.shape, pool), jnp.float32)
    none = jnp.zeros(0, jnp.float32)
    return native.call(
        "activate",
        out,
        source,
        jnp.stack(line),
        none if offsets is None else offsets,
        none if added is None else added,
        pool=np.int64(pool),
    )


def gradient_sums(
    source: jax.Array, line: Line, pool: int, d: jax.Array, samples: jax.Array | None
) -> jax.Array:
    """Sums over samples and positions, ``float32[4, C]``: the gradients of Q1, P1, Q0 and P0.

    Args:
      source, line, pool: of the forward pass.
      d: gradient of ``t``, of the samples kept.
      samples: their indices, increasing; ``None`` for all.
    """
    return native.call(
        "gradient_sums",
        jax.ShapeDtypeStruct((4, source.shape[3]), jnp.float32),
        source,
        jnp.stack(line),
        d,
        _indices(samples),
        pool=np.int64(pool),
        selects_samples=samples is not None,
    )


def gradient(
    source: jax.Array,
    line: Line,
    flow: Flow,
    pool: int,
    d: jax.Array,
    samples: jax.Array | None,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``g``, and its minimum and maximum for each sample and channel, ``float32[N, C]``.

    The gradient of a window's maximum goes to the first entry that attains it. The flow into a
    sample is multiplied by its weight, that of :func:`moments`.
    """
    n, _, _, c = source.shape
    bounds = jax.ShapeDtypeStruct((n, c), jnp.float32)
    rows = (*line, line.p1, flow.h1, flow.k1, line.p0, flow.h0, flow.k0)
    return native.call(
        "gradient",
        (jax.ShapeDtypeStruct(source.shape, jnp.float32), bounds, bounds),
        source,
        jnp.stack(rows),
        d,
        _indices(samples),
        _weights(weights),
        pool=np.int64(pool),
        selects_samples=samples is not None,
    )


def encode_weights(w: jax.Array) -> tuple[PackedBits, jax.Array]:
    """Signs of ``float32[..., O]``, and the mean of ``|w|`` in each output channel."""
    words = jax.ShapeDtypeStruct((-(-w.size // WORD_BITS),), jnp.uint32)
    scale = jax.ShapeDtypeStruct((w.shape[-1],), jnp.float32)
    signs, scale = native.call("encode_weights", (words, scale), w.reshape(-1, w.shape[-1]))
    return PackedBits(signs, w.shape), scale


def finish_weight_grad(dw: jax.Array, w: jax.Array, d_scale: jax.Array, *, clip: bool) -> jax.Array:
    """``[|w| <= 1] dw + sign(w) d_scale``, in the memory of ``dw``.

    Args:
      dw: gradient with respect to the signs, ``float32[..., O]``.
      w: the weights, of its shape.
      d_scale: ``float32[O]``.
      clip: whether the straight-through gradient is cut off; ``False`` leaves out the mask.
    """
    # Without a reshape: XLA would copy the gradient for it, as it is to be overwritten.
    out = jax.ShapeDtypeStruct(w.shape, jnp.float32)
    return native.call("finish_weight_grad", out, dw, w, d_scale, in_place={0: 0}, clips=clip)


def pooled_shape(shape: tuple[int, ...], pool: int) -> tuple[int, ...]:
    """Shape of ``t``."""
    return shape[0], shape[1] // pool, shape[2] // pool, shape[3]


def _weights(weights: jax.Array | None) -> jax.Array:
    return jnp.zeros(0, jnp.float32) if weights is None else weights


def _indices(samples: jax.Array | None) -> jax.Array:
    return jnp.zeros(0, jnp.int32) if samples is None else samples
