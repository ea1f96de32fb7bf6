"""Stochastic rounding of groups, in a fixed point that every implementation computes alike.

A group of entries with minimum ``lo`` and range ``R = max - min`` is rounded to ``b`` bits by ::

    t    = int32((g - lo) * s)        s = (2^b - 1) * 2^16 / R
    code = (t + u) >> 16              u: 16 uniform bits, hashed from (seed, index of the entry)
    g'   = lo + code * R / (2^b - 1)

The subtraction comes before the product, so no compiler can contract the two into a fused
multiply-add, and the codes are the same on every backend. ``E[g'] = g``, up to the resolution of
the fixed point: ``t`` is cut off, which lowers the mean by less than 2^-16 of a step. Ranges below
:data:`MIN_RANGE` are taken to be :data:`MIN_RANGE`, which keeps ``s`` finite; the result stays
unbiased on the coarser grid, and a constant group is exact.
"""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp

from fqt_jax.binarize import check_float

FRACTION_BITS = 16
MIN_RANGE = 2.0**-100


def seeds_from_key(key: jax.Array, n: int) -> list[jax.Array]:
    """Derives ``n`` independent seeds ``uint32[2]`` for :func:`counter_bits` from a JAX key.

    The key's words are hashed by :func:`counter_bits` itself, twice with the words exchanged, so
    that each enters four rounds. JAX's own generator would do as well, but compiling it once for
    every layer takes longer than compiling the layer.

    Args:
      key: a typed JAX key, or raw ``uint32`` key data.
      n: number of seeds.

    Example:
      >>> import jax
      >>> [seed.shape for seed in seeds_from_key(jax.random.key(0), 2)]
      [(2,), (2,)]
    """
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(key) if typed else key
    words = jnp.arange(2 * n, dtype=jnp.uint32)
    for i in range(0, data.shape[-1], 2):
        pair = jnp.stack([data[i], data[(i + 1) % data.shape[-1]]])
        words = counter_bits(pair[::-1], counter_bits(pair, words))
    return [words[2 * i : 2 * i + 2] for i in range(n)]


def counter_bits(seed: jax.Array, index: jax.Array) -> jax.Array:
    """32 uniform bits for each counter value: an integer hash of ``(seed, index)``.

    Two rounds of xor-shift and odd multiplication, with a word of the seed entering before each,
    so that streams of different seeds are not shifts of one another. One round does not hide a
    small difference of the second words: derive seeds with :func:`seeds_from_key`, never by
    counting up.

    Args:
      seed: ``uint32[2]``.
      index: ``uint32`` array of counter values, any shape.

    Returns:
      ``uint32`` array like ``index``.

    Example:
      >>> import jax.numpy as jnp
      >>> bits = counter_bits(jnp.array([1, 2], jnp.uint32), jnp.arange(3, dtype=jnp.uint32))
      >>> bits.dtype, bits.shape
      (dtype('uint32'), (3,))
    """
    x = index ^ seed[0]
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = x ^ seed[1]
    x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)


def code_scale(value_range: jax.Array, bits: int) -> jax.Array:
    """``s = (2^b - 1) * 2^16 / R``, with ``R`` already at least :data:`MIN_RANGE`."""
    return jnp.float32(((1 << bits) - 1) << FRACTION_BITS) / value_range


def clamp_range(value_range: jax.Array) -> jax.Array:
    """The range used for rounding: ``max(R, MIN_RANGE)``; NaN stays NaN."""
    return jnp.maximum(value_range, jnp.float32(MIN_RANGE))


def round_to_codes(
    g: jax.Array, lo: jax.Array, scale: jax.Array, seed: jax.Array, index: jax.Array, bits: int
) -> jax.Array:
    """Codes ``0 .. 2^b - 1`` of ``g`` as ``int32``; see the module's docstring.

    Args:
      g: ``float32`` values.
      lo: minimum of each entry's group, broadcastable to ``g``.
      scale: ``s`` of each entry's group (:func:`code_scale`), broadcastable to ``g``.
      seed: ``uint32[2]``.
      index: ``uint32`` counter of each entry, broadcastable to ``g``.
      bits: width of a code.
    """
    top = ((1 << bits) - 1) << FRACTION_BITS
    t = jnp.clip(((g - lo) * scale).astype(jnp.int32), 0, top)
    u = (counter_bits(seed, index) >> (32 - FRACTION_BITS)).astype(jnp.int32)
    return (t + u) >> FRACTION_BITS


def flat_index(shape: tuple[int, ...]) -> jax.Array:
    """``uint32`` array of ``shape`` that holds each entry's flat index in C order, modulo 2^32."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        iota = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index = index + iota * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= shape[axis]
    return index


def stochastic_round(
    x: jax.Array, *, key: jax.Array, bits: int, axis: int | tuple[int, ...] | None = 0
) -> jax.Array:
    r"""Rounds each group of ``x`` to ``2^bits`` levels between its minimum and maximum, unbiased.

    With :math:`\ell` the group's minimum, :math:`R` its range and :math:`B = 2^b - 1`,

    .. math:: x' = \ell + \frac{R}{B} \left\lfloor \frac{B (x - \ell)}{R} + u \right\rfloor,
       \qquad u \sim U[0, 1), \quad \mathrm{E}[x'] = x .

    The variance of an entry is :math:`(R / B)^2 f (1 - f)`, with :math:`f` the fractional part of
    :math:`B (x - \ell) / R`. A constant group is exact. A NaN makes its whole group NaN.

    Args:
      x: floating-point array, any shape, empty included.
      key: JAX random key.
      bits: width of a code, 1 to 8.
      axis: the axis (or axes) that tells the groups apart; ``None`` makes all of ``x`` one group.

    Returns:
      The rounded values, of the shape and type of ``x``. Not differentiable through the rounding:
      the gradient is that of the identity.

    Raises:
      TypeError: ``x`` is not a floating-point array, or ``bits`` not an integer.
      ValueError: ``bits`` is outside 1..8 or ``axis`` is outside the axes of ``x``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fqt_jax import stochastic_round
      >>> x = jnp.array([[0.0, 0.25, 1.0], [5.0, 5.0, 5.0]])
      >>> stochastic_round(x, key=jax.random.key(0), bits=2)[:, 2]  # extremes are exact
      Array([1., 5.], dtype=float32)
      >>> draws = jax.vmap(lambda k: stochastic_round(x, key=k, bits=1))(
      ...     jax.random.split(jax.random.key(0), 4000)
      ... )
      >>> bool(abs(draws[:, 0, 1].mean() - 0.25) < 0.03)
      True

    References:
      arXiv 2408.14267, section 3 and equation 3.
    """
    check_float("x", x)
    bits = check_bits(bits)
    if axis is None:
        kept: tuple[int, ...] = ()
    else:
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        for a in axes:
            if not -x.ndim <= a < x.ndim:
                raise ValueError(f"axis {a} is outside the {x.ndim} axes of x.")
        kept = tuple(a % x.ndim for a in axes)
    if x.size == 0:
        return x
    reduced = tuple(a for a in range(x.ndim) if a not in kept)
    g = x.astype(jnp.float32)
    lo = jnp.min(g, axis=reduced, keepdims=True)
    value_range = clamp_range(jnp.max(g, axis=reduced, keepdims=True) - lo)
    (seed,) = seeds_from_key(key, 1)
    codes = round_to_codes(g, lo, code_scale(value_range, bits), seed, flat_index(x.shape), bits)
    step = value_range / jnp.float32((1 << bits) - 1)
    rounded = (lo + codes.astype(jnp.float32) * step).astype(x.dtype)
    return _straight_through(x, rounded)


@jax.custom_jvp
def _straight_through(x: jax.Array, value: jax.Array) -> jax.Array:
    """``value``, with the gradient of ``x``."""
    return value


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0]


def check_bits(bits: int) -> int:
    """Returns ``bits`` as an ``int`` in 1..8, or raises."""
    try:
        if isinstance(bits, bool):
            raise TypeError
        value = operator.index(bits)
    except TypeError:
        raise TypeError(f"bits must be an integer from 1 to 8; got {bits!r}.") from None
    if not 1 <= value <= 8:
        raise ValueError(f"bits must be an integer from 1 to 8; got {value}.")
    return value
