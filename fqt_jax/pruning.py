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

import jax
import jax.numpy as jnp

from fqt_jax.binarize import check_float
from fqt_jax.importance import GroupStatistics, Importance
from fqt_jax.recipe import GradientQuantizer
from fqt_jax.rounding import seeds_from_key
from fqt_jax.samplers import Sampler, SamplerName, as_sampler
from fqt_jax.selection import Selection


def draw(
    importance: jax.Array, k: int, sampler: Sampler | SamplerName, seed: jax.Array
) -> Selection:
    """Draws ``k`` groups by their importance; see :func:`prune`.

    Args:
      importance: ``float32[n]``; for ``"topk"`` the quantity whose largest entries are kept.
      k: number of groups to keep; static.
      sampler: the sampler, or its name.
      seed: ``uint32[2]`` (:func:`fqt_jax.rounding.seeds_from_key`).
    """
    sampler = as_sampler(sampler)
    return sampler.draw(sampler.probabilities(importance, k), k, seed)


def draw_groups(
    groups: GroupStatistics, quantizer: GradientQuantizer, seed: jax.Array
) -> Selection | None:
    """Draws the groups that a quantizer keeps; ``None`` where it keeps all."""
    n = groups.lo.shape[0]
    k = quantizer.kept(n)
    if k == n:
        return None
    importance = quantizer.sampler.measure(groups, quantizer.importance)
    return draw(importance, k, quantizer.sampler, seed)


def prune(
    g: jax.Array,
    *,
    key: jax.Array,
    keep: float,
    sampler: Sampler | SamplerName = "systematic",
    importance: Importance = "range",
    axis: int = 0,
) -> Selection:
    r"""Draws the groups of a gradient that are kept, ``k = max(1, round(keep * n))`` of ``n``.

    The samplers are those of :mod:`fqt_jax.samplers`. With the unbiased ones, the variance of
    ``selection.expand()[i] * g[i]``, summed over all entries, is
    :math:`\sum_i \frac{1 - p_i}{p_i} \lVert g_i \rVert^2`.

    Args:
      g: floating-point array; a group is everything at one index of ``axis``.
      key: JAX random key.
      keep: fraction of groups that is kept, in (0, 1].
      sampler: ``"systematic"``, ``"bernoulli"``, ``"uniform"`` or ``"topk"``, or a sampler itself.
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
    drawn = None
    if g.size:
        rows = jnp.moveaxis(g, axis, 0).astype(jnp.float32).reshape(n, -1)
        (seed,) = seeds_from_key(key, 1)
        drawn = draw_groups(GroupStatistics.of_rows(rows), quantizer, seed)
    if drawn is None:
        k = quantizer.kept(n)
        return Selection(jnp.arange(k, dtype=jnp.int32), jnp.ones(k, jnp.float32), n)
    return drawn
