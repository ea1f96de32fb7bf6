"""Keep probabilities in float64, and what depends on more than them: which groups go together."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from fqt_jax.importance import GroupStatistics
from fqt_jax.recipe import GradientQuantizer
from fqt_jax.samplers import Sampler, SamplerName, as_sampler

Float = npt.NDArray[np.float64]


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
    k = quantizer.kept(rows.shape[0])
    if k == rows.shape[0]:
        return np.ones(k)
    groups = GroupStatistics.of_rows(jnp.asarray(rows))
    importance = quantizer.sampler.measure(groups, quantizer.importance)
    return np.asarray(_probabilities(importance, quantizer.sampler, k), np.float64)


@functools.partial(jax.jit, static_argnames=("sampler", "k"))
def _probabilities(importance: jax.Array, sampler: Sampler, k: int) -> jax.Array:
    return sampler.probabilities(importance, k)


def sampled_sum_variance(
    terms: npt.ArrayLike, p: npt.ArrayLike, sampler: Sampler | SamplerName
) -> float:
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
      sampler: the sampler, or its name; one that is unbiased.

    Returns:
      The variance, exact. (For a sampler of one's own without a formula, measured over draws.)

    Raises:
      ValueError: the sampler is biased, or a group that is not zero is never kept.

    Example:
      >>> terms, p = [[1.0], [-1.0], [1.0], [-1.0]], [0.5] * 4
      >>> sampled_sum_variance(terms, p, "bernoulli")
      4.0
      >>> sampled_sum_variance(terms, p, "systematic")  # keeps 1 and 3, or 2 and 4
      16.0
    """
    sampler = as_sampler(sampler)
    if not sampler.unbiased:
        raise ValueError(f"the sampler must be unbiased, which {str(sampler)!r} is not.")
    p = np.asarray(p, np.float64)
    u = np.asarray(terms, np.float64).reshape(p.size, -1)
    if np.any((p <= 0) & np.any(u != 0, axis=1)):
        raise ValueError("a group that is not zero has keep probability 0: the sum is biased.")
    return sampler.sum_variance(u, p)
