r"""Activation Gradient Pruning: which groups of a gradient are kept, and with what weight.

Of ``n`` groups, ``k`` are kept. Group ``i`` is kept with probability :math:`p_i` and scaled by
:math:`1 / p_i`, which leaves the expectation as it was. The probabilities are proportional to the
groups' importance and capped at one,

.. math:: p_i = \min(1, c\, r_i), \qquad \sum_i p_i = k .

The paper's :math:`p_i = n R_i / (b \sum_j R_j)` exceeds one where a few groups carry most of the
gradient, as they do in practice; the cap keeps the estimate unbiased. (arXiv 2408.14267, section
4.1.)
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from fqt_jax.binarize import check_float
from fqt_jax.recipe import GradientQuantizer, Importance, Sampler
from fqt_jax.rounding import counter_bits, seeds_from_key

_UNIT = 2.0**32


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


def keep_probabilities(importance: jax.Array, k: int | jax.Array) -> jax.Array:
    r"""Keep probabilities :math:`p_i = \min(1, c\, r_i)` that sum to ``k`` (water-filling).

    Groups of zero importance are dropped for certain unless fewer than ``k`` groups have any;
    then those all get one, and the rest of ``k`` is spread evenly over the others.

    Args:
      importance: ``r``, ``float[n]``, not negative.
      k: number of groups to keep, ``0 <= k <= n``.

    Returns:
      ``p``, ``float32[n]``, each in [0, 1]. NaN everywhere if the importance has a NaN.

    Raises:
      TypeError: ``importance`` is not a floating-point array.
      ValueError: ``importance`` is not one-dimensional, or ``k`` is outside 0..n.

    Example:
      >>> import jax.numpy as jnp
      >>> from fqt_jax import keep_probabilities
      >>> keep_probabilities(jnp.array([8.0, 1.0, 1.0, 2.0]), 2)
      Array([1.  , 0.25, 0.25, 0.5 ], dtype=float32)
    """
    check_float("importance", importance)
    if importance.ndim != 1:
        raise ValueError(f"importance must have one axis; got shape {importance.shape}.")
    n = importance.shape[0]
    if isinstance(k, int) and not 0 <= k <= n:
        raise ValueError(f"k must be from 0 to the number of groups, {n}; got {k}.")
    if n == 0:
        return importance.astype(jnp.float32)
    r = importance.astype(jnp.float32)
    ordered = -jnp.sort(-r)
    # In units of the k-th largest, so that no span of importance underflows where it matters.
    # What exceeds n such units is capped at one however large it is.
    unit = ordered[jnp.clip(jnp.asarray(k, jnp.int32) - 1, 0, n - 1)]
    unit = jnp.maximum(unit, jnp.float32(jnp.finfo(jnp.float32).tiny))
    r, ordered = (jnp.minimum(v / unit, jnp.float32(2 * n)) for v in (r, ordered))
    k = jnp.asarray(k, jnp.float32)
    tail = jnp.cumsum(ordered[::-1])[::-1]  # tail[m] = sum of all but the m largest
    m = jnp.arange(n, dtype=jnp.float32)
    # The m largest are capped at one, where m is the first count whose c = (k - m) / tail[m] caps
    # no further group.
    fits = (m < k) & ((k - m) * ordered <= tail)
    first = jnp.argmax(fits)
    c = (k - m[first]) / jnp.maximum(tail[first], jnp.float32(jnp.finfo(jnp.float32).tiny))
    p = jnp.minimum(1.0, c * r)
    positive = jnp.sum(r > 0, dtype=jnp.float32)
    spread = (k - positive) / jnp.maximum(n - positive, 1.0)
    p = jnp.where(positive <= k, jnp.where(r > 0, 1.0, spread), p)
    p = jnp.where(k == 0, 0.0, p)
    return jnp.where(jnp.isnan(tail[0]), jnp.nan, p).astype(jnp.float32)


def draw(importance: jax.Array, k: int, sampler: Sampler, seed: jax.Array) -> Selection:
    """Draws ``k`` groups by ``sampler``; see :func:`prune`.

    Args:
      importance: ``float32[n]``; for ``"topk"`` the quantity whose largest entries are kept.
      k: number of groups to keep; static.
      sampler: name of the sampler.
      seed: ``uint32[2]`` (:func:`fqt_jax.rounding.seeds_from_key`).
    """
    n = importance.shape[0]
    every = jnp.arange(n, dtype=jnp.int32)
    if sampler == "topk":
        indices = jnp.sort(jax.lax.top_k(importance, k)[1]).astype(jnp.int32)
        return Selection(indices, jnp.ones(k, jnp.float32), n)
    if sampler == "uniform":
        # The k smallest of n random words: every subset is equally likely, up to ties of 32 bits.
        order = jnp.argsort(counter_bits(seed, every.astype(jnp.uint32)))
        indices = jnp.sort(order[:k]).astype(jnp.int32)
        return Selection(indices, jnp.full(k, n / max(k, 1), jnp.float32), n)

    p = keep_probabilities(importance, k)
    saturated = p >= 1
    # Probabilities in units of 2^-32, so that sums of many small ones lose nothing. The weight is
    # the inverse of the rounded probability, which keeps the estimate unbiased.
    units = jnp.where(saturated, 0.0, p * _UNIT).astype(jnp.uint32)
    units = jnp.where((p > 0) & ~saturated, jnp.maximum(units, 1), units)
    weights = jnp.where(saturated, 1.0, _UNIT / jnp.maximum(units, 1).astype(jnp.float32))
    weights = jnp.where(jnp.isnan(p), jnp.nan, weights)
    if sampler == "bernoulli":
        kept = saturated | (counter_bits(seed, every.astype(jnp.uint32)) < units)
        return Selection(every, jnp.where(kept | jnp.isnan(p), weights, 0.0), n)
    # Systematic: lay the probabilities end to end and keep the groups in which the points
    # u, u + 1, u + 2, ... fall, that is where the running sum of fractions wraps around.
    running = seed[0] + jnp.cumsum(units, dtype=jnp.uint32)
    kept = saturated | (running < units)
    # Rounding of the units can make the count k + 1 or k - 1, about once in 10^5 draws: the last
    # is then dropped, or a slot is left with weight zero.
    order = jnp.argsort(~kept, stable=True)[:k]
    indices = jnp.sort(order).astype(jnp.int32)
    selected = kept[indices] | jnp.isnan(p[indices])
    return Selection(indices, jnp.where(selected, weights[indices], 0.0), n)


def group_importance(
    lo: jax.Array, hi: jax.Array, square_sum: jax.Array | None, sampler: Sampler
) -> jax.Array:
    """Importance of groups from their minimum and maximum, or from their sum of squares if given.

    The range is taken together with zero, ``max(hi, 0) - min(lo, 0)``: the same as the range
    for groups with entries of both signs, and positive for a constant group that is not zero,
    which would otherwise never be kept. The ``"topk"`` sampler goes by ``max(abs(g))``.
    """
    if sampler == "topk":
        return jnp.maximum(jnp.abs(lo), jnp.abs(hi))
    if square_sum is not None:
        return jnp.sqrt(square_sum)
    return jnp.maximum(hi, 0.0) - jnp.minimum(lo, 0.0)


def prune(
    g: jax.Array,
    *,
    key: jax.Array,
    keep: float,
    sampler: Sampler = "systematic",
    importance: Importance = "range",
    axis: int = 0,
) -> Selection:
    r"""Draws the groups of a gradient that are kept, ``k = max(1, round(keep * n))`` of ``n``.

    ============== ======================== ========= =============================
    sampler        number kept              unbiased  probability
    ============== ======================== ========= =============================
    ``systematic`` exactly k                yes       water-filled importance
    ``bernoulli``  random, k on average     yes       water-filled importance
    ``topk``       exactly k                no        the k largest ``max(abs(g))``
    ``uniform``    exactly k                yes       k / n
    ============== ======================== ========= =============================

    For the unbiased samplers, the variance of ``selection.expand()[i] * g[i]`` summed over all
    entries is :math:`\sum_i \frac{1 - p_i}{p_i} \lVert g_i \rVert^2`.

    Args:
      g: floating-point array; a group is everything at one index of ``axis``.
      key: JAX random key.
      keep: fraction of groups that is kept, in (0, 1].
      sampler: ``"systematic"``, ``"bernoulli"``, ``"topk"`` or ``"uniform"``.
      importance: ``"range"`` (of the group together with zero) or ``"norm"`` (Euclidean).
      axis: the axis that tells the groups apart.

    Returns:
      A :class:`Selection` of ``k`` groups (of all ``n``, some with weight zero, for
      ``"bernoulli"``).

    Raises:
      TypeError: ``g`` is not a floating-point array.
      ValueError: ``keep``, ``sampler``, ``importance`` or ``axis`` is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fqt_jax import prune
      >>> g = jnp.array([[8.0, -8.0], [0.0, 0.0], [1.0, -1.0], [1.0, 1.0]])
      >>> kept = prune(g, key=jax.random.key(0), keep=0.5)
      >>> kept.indices.shape, int(kept.indices[0]), float(kept.weights[0])
      ((2,), 0, 1.0)
    """
    check_float("g", g)
    quantizer = GradientQuantizer(keep=keep, sampler=sampler, importance=importance)
    if not -g.ndim <= axis < g.ndim:
        raise ValueError(f"axis {axis} is outside the {g.ndim} axes of g.")
    n = g.shape[axis]
    k = quantizer.kept(n)
    if k == n or g.size == 0:
        return Selection(jnp.arange(k, dtype=jnp.int32), jnp.ones(k, jnp.float32), n)
    rows = jnp.moveaxis(g, axis, 0).astype(jnp.float32).reshape(n, -1)
    lo, hi = jnp.min(rows, axis=1), jnp.max(rows, axis=1)
    squares = None
    if importance == "norm":
        squares = sum_of_squares(rows, jnp.max(jnp.maximum(-lo, hi)), axis=1)
    (seed,) = seeds_from_key(key, 1)
    return draw(group_importance(lo, hi, squares, sampler), k, sampler, seed)


def sum_of_squares(g: jax.Array, largest: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """Sum of ``(g / largest)^2``: relative, since squares of small gradients would underflow."""
    inverse = 1.0 / jnp.maximum(largest, jnp.float32(jnp.finfo(jnp.float32).tiny))
    return jnp.sum(jnp.square(g * inverse), axis=axis)
