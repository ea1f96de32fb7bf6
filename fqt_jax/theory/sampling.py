"""Keep probabilities in float64, and what depends on more than them: which groups go together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from fqt_jax.pruning import group_importance, keep_probabilities, sum_of_squares
from fqt_jax.recipe import GradientQuantizer, Sampler

Float = npt.NDArray[np.float64]

_keep_probabilities = jax.jit(keep_probabilities)

_ROUNDING = 1e-6
"""Keep probabilities come as float32: their running sums are whole numbers only up to this."""


def group_probabilities(g: npt.ArrayLike, quantizer: GradientQuantizer, axis: int) -> Float:
    """The probability :math:`p_i` with which each group of a gradient is kept.

    Args:
      g: gradient of a layer's output.
      quantizer: how many groups are kept, and by what.
      axis: the axis that tells the groups apart: 0 for samples, -1 for output channels.

    Returns:
      ``p``, ``[groups]``. For ``"topk"`` they are 0 and 1: that sampler draws nothing.

    Example:
      >>> import numpy as np
      >>> from fqt_jax import GradientQuantizer
      >>> g = np.array([[4.0, -4.0], [1.0, -1.0], [0.5, -0.5], [0.5, -0.5]])
      >>> group_probabilities(g, GradientQuantizer(bits=4, keep=0.5), axis=0)
      array([1. , 0.5 , 0.25, 0.25])
    """
    rows = np.moveaxis(np.asarray(g, np.float32), axis, 0)
    rows = rows.reshape(rows.shape[0], -1)
    n = rows.shape[0]
    k = quantizer.kept(n)
    if k == n:
        return np.ones(n)
    if quantizer.sampler == "uniform":
        return np.full(n, k / n)
    squares = None
    if quantizer.importance == "norm":
        squares = sum_of_squares(jnp.asarray(rows), jnp.asarray(np.abs(rows).max()), axis=1)
    lo, hi = jnp.asarray(rows.min(axis=1)), jnp.asarray(rows.max(axis=1))
    importance = group_importance(lo, hi, squares, quantizer.sampler)
    if quantizer.sampler == "topk":
        # The lower index wins a tie, as in jax.lax.top_k.
        kept = np.argsort(-np.asarray(importance), kind="stable")[:k]
        return np.isin(np.arange(n), kept).astype(np.float64)
    return np.asarray(_keep_probabilities(importance, k), np.float64)


def systematic_selections(p: npt.ArrayLike) -> tuple[Float, Float]:
    r"""Every outcome of systematic sampling: there are no more than there are groups.

    The probabilities are laid end to end on a circle of length one, group ``i`` on the interval
    that ends at :math:`P_i = p_1 + \dots + p_i`, and the groups are kept that cover a point
    :math:`u` drawn uniformly. The outcome changes only where :math:`u` passes the fractional part
    of a :math:`P_i`.

    Args:
      p: keep probabilities, ``[n]``, each in [0, 1], whose sum is a whole number.

    Returns:
      ``(probability, weights)``: the probability of each of the ``m`` outcomes, ``[m]``, and the
      groups' weights in it, ``[m, n]``: :math:`1/p_i` where kept, else 0.

    Raises:
      ValueError: the sum is not a whole number.

    Example:
      >>> probability, weights = systematic_selections([0.5, 0.75, 0.75])
      >>> probability
      array([0.25, 0.25, 0.5 ])
      >>> (weights > 0).astype(int)
      array([[1, 1, 0],
             [1, 0, 1],
             [0, 1, 1]])
    """
    p = np.asarray(p, np.float64)
    # Those kept for certain take no part in the draw.
    running = np.concatenate([[0.0], np.cumsum(np.where(p < 1, p, 0.0))])
    if abs(running[-1] - np.round(running[-1])) > _ROUNDING * max(1, p.size):
        raise ValueError(f"the keep probabilities must sum to a whole number; got {p.sum():g}.")
    cuts = np.unique(np.concatenate([[0.0, 1.0], running[:-1] % 1.0]))
    middle = (cuts[1:] + cuts[:-1]) / 2
    # A point u + j lies in the interval (P_{i-1}, P_i] for some whole j.
    kept = np.floor(running[None, 1:] - middle[:, None]) > np.floor(
        running[None, :-1] - middle[:, None]
    )
    kept |= p[None] >= 1
    weights = np.where(kept, 1 / np.where(p > 0, p, 1), 0.0)
    return np.diff(cuts), weights


def drawn_weights(p: Float, sampler: Sampler, draws: int, seed: int) -> tuple[Float, Float]:
    """Outcomes of a sampler with their probabilities: all of them, or ``draws`` drawn ones."""
    if np.all((p == 0) | (p == 1)):
        return np.ones(1), p[None]
    if sampler == "systematic":
        return systematic_selections(p)
    rng = np.random.default_rng(seed)
    if sampler == "bernoulli":
        kept = rng.random((draws, p.size)) < p
    else:
        k = round(p.sum())
        kept = rng.random((draws, p.size)).argsort(axis=1).argsort(axis=1) < k
    return np.full(draws, 1 / draws), np.where(kept, 1 / np.where(p > 0, p, 1), 0.0)


def sampled_sum_variance(terms: npt.ArrayLike, p: npt.ArrayLike, sampler: Sampler) -> float:
    r"""Variance of a sum over sampled groups, entry by entry and added up.

    A sum :math:`s = \sum_i (m_i / p_i)\, u_i` over groups, with :math:`m_i` the indicator that
    group ``i`` is kept, has the variance

    .. math:: \sum_i \frac{1 - p_i}{p_i} \lVert u_i \rVert^2 + \sum_{i \ne j}
       \left(\frac{p_{ij}}{p_i p_j} - 1\right) \langle u_i, u_j \rangle,
       \qquad p_{ij} = \Pr[i \text{ and } j \text{ kept}].

    The second sum is what the keep probabilities do not tell: it is zero for ``"bernoulli"`` and
    depends on the order of the groups for ``"systematic"``. With ``prune="shared"`` the weight
    gradient is such a sum over samples, with :math:`u_i` the part that sample ``i`` adds.

    Args:
      terms: ``u``, ``[n, ...]``.
      p: keep probabilities, ``[n]``, all positive where ``u`` is not zero.
      sampler: ``"systematic"``, ``"bernoulli"`` or ``"uniform"``.

    Returns:
      The variance, exact.

    Raises:
      ValueError: the sampler is not one of these three, or a group that is not zero is never kept.

    Example:
      >>> terms, p = [[1.0], [-1.0], [1.0], [-1.0]], [0.5] * 4
      >>> sampled_sum_variance(terms, p, "bernoulli")
      4.0
      >>> sampled_sum_variance(terms, p, "systematic")  # keeps 1 and 3, or 2 and 4
      16.0
    """
    p = np.asarray(p, np.float64)
    u = np.asarray(terms, np.float64).reshape(p.size, -1)
    squares = np.sum(u**2, axis=1)
    if np.any((p <= 0) & (squares > 0)):
        raise ValueError("a group that is not zero has keep probability 0: the sum is biased.")
    alone = float(np.sum((1 - p) / np.where(p > 0, p, 1) * squares))
    if sampler == "bernoulli":
        return alone
    total = u.sum(axis=0)
    if sampler == "systematic":
        probability, weights = systematic_selections(p)
        return float(np.sum(probability * np.sum((weights @ u - total) ** 2, axis=1)))
    if sampler == "uniform":
        n, k = p.size, round(p.sum())
        both = k * (k - 1) / (n * (n - 1)) if n > 1 else 1.0
        cross = float(np.sum(total**2) - np.sum(squares))
        return alone + (both / (k / n) ** 2 - 1) * cross
    raise ValueError(f"sampler must be systematic, bernoulli or uniform; got {sampler!r}.")
