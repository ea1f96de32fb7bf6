r"""The exact error of the pruned, rounded gradient, and the bounds published for it.

Everything here is about ``g`` itself, entry by entry: the sum over all entries of
:math:`\mathrm{E}[(Q(g) - g)^2]`. Each entry's part depends on the probability that its own group
is kept and on nothing else, so the sums are exact for every sampler with these probabilities,
whichever groups it keeps together. For sums over groups see
:func:`fqt_jax.theory.sampled_sum_variance`. (``docs/theory.md``, sections 1 to 3.)
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from fqt_jax.grids import GRIDS, Grid
from fqt_jax.recipe import GradientQuantizer, Product
from fqt_jax.rounding import MIN_RANGE
from fqt_jax.samplers import Sampler
from fqt_jax.selection import GroupAxis
from fqt_jax.theory.sampling import Float, group_probabilities

_AXES: dict[GroupAxis, int] = {"samples": 0, "channels": 2}
"""Of a gradient ``[samples, positions, channels]``."""


class GradientError(NamedTuple):
    r"""Mean squared error of a quantized gradient, :math:`\mathrm{E} \lVert Q(g) - g \rVert^2`.

    Attributes:
      rounding: :math:`\sum_i \mathrm{SR}_i / p_i`, from rounding the groups that are kept.
      mask: :math:`\sum_i \frac{1 - p_i}{p_i} \lVert g_i \rVert^2`, from dropping groups at random.
      bias: zero for the unbiased samplers, which rescale what they keep. For those that do not,
        :math:`\sum_i (1 - p_i)^2 \lVert g_i \rVert^2`, and :math:`p_i` stands in place of
        :math:`1 / p_i` above: for ``"topk"`` that is what it drops, and nothing is random.
    """

    rounding: float
    mask: float
    bias: float

    @property
    def variance(self) -> float:
        """``rounding + mask``."""
        return self.rounding + self.mask

    @property
    def total(self) -> float:
        """``rounding + mask + bias``: equal to the variance where nothing is biased."""
        return self.rounding + self.mask + self.bias


def rounding_variance(
    g: npt.ArrayLike,
    bits: int,
    axis: int | tuple[int, ...] | None = 0,
    *,
    grid: Grid = "range",
) -> Float:
    r"""Variance of each entry under stochastic rounding, :math:`(R / B)^2 f (1 - f)`.

    ``R`` is the range of the entry's group, :math:`B = 2^b - 1`, and ``f`` the fractional part of
    :math:`B (g - \mathrm{lo}) / R`. At most :math:`R^2 / (4 B^2)`. With ``grid="zero"``, ``lo`` and
    ``R`` are those of the grid with a level at zero.

    Args:
      g: gradient, any shape.
      bits: width of a code.
      axis: the axes that tell the groups apart; ``None`` makes one group of all.
      grid: where the levels lie (:data:`fqt_jax.grids.GRIDS`).

    Returns:
      ``float64`` of the shape of ``g``.

    Example:
      >>> rounding_variance([[0.0, 0.25, 1.0]], bits=1)
      array([[0.    , 0.1875, 0.    ]])
    """
    g = np.asarray(g, np.float64)
    own = () if axis is None else ((axis,) if isinstance(axis, int) else axis)
    reduced = tuple(a for a in range(g.ndim) if a not in {o % g.ndim for o in own})
    lo, hi = g.min(axis=reduced, keepdims=True), g.max(axis=reduced, keepdims=True)
    lowest, value_range = GRIDS[grid](lo, hi, bits)
    step = np.maximum(value_range, MIN_RANGE) / (2**bits - 1)
    position = (g - lowest) / step
    fraction = position - np.floor(position)
    return step**2 * fraction * (1 - fraction)


def gradient_error(
    g: npt.ArrayLike,
    quantizer: GradientQuantizer,
    *,
    product: Product = "input",
    selections: int = 256,
    seed: int = 0,
) -> GradientError:
    r"""Mean squared error of the gradient as the input or the weight gradient sees it.

    .. math:: \mathrm{E} \lVert Q(g) - g \rVert^2 = \sum_i \left[\frac{\mathrm{SR}_i}{p_i}
       + \frac{1 - p_i}{p_i} \lVert g_i \rVert^2\right], \qquad
       \mathrm{SR}_i = \sum_{j \in i} \frac{R_i^2}{B^2} f_{ij} (1 - f_{ij})

    over groups of samples (``product="input"``) or of output channels (``product="weight"``).
    With ``prune="shared"`` the weight gradient rounds the kept samples, their weights folded in,
    per channel: its grid depends on which samples were drawn. The mask term stays as above, with
    the samples' probabilities; the rounding term is the mean of that of each outcome of the draw
    (:meth:`fqt_jax.samplers.Sampler.outcomes`): of all outcomes for ``"systematic"``, so that the
    result is exact, and of ``selections`` drawn ones for ``"bernoulli"`` and ``"uniform"``.

    The library rounds in a fixed point of 2^-16 steps, which moves a mean by less than that part
    of a step, and no variance by more than it.

    Args:
      g: gradient of the product's output, samples on the first axis and output channels on the
        last.
      quantizer: bits, keep, sampler, importance, groups, prune, grid.
      product: which of the two products it is quantized for.
      selections: outcomes to average over where there are too many to take all.
      seed: of that average.

    Returns:
      The error, by term.

    Raises:
      ValueError: ``g`` has fewer than two axes, or ``product`` is not one of the two.

    Example:
      >>> import numpy as np
      >>> from fqt_jax import GradientQuantizer
      >>> g = np.array([[4.0, -4.0], [1.0, -1.0], [0.5, -0.5], [0.5, -0.5]])
      >>> gradient_error(g, GradientQuantizer(bits=4, keep=0.5))  # two entries: their own extremes
      GradientError(rounding=0.0, mask=5.0, bias=0.0)

    References:
      arXiv 2408.14267, section 4.1, has the rounding term's bound and leaves the mask term out.
    """
    g = np.asarray(g, np.float64)
    if g.ndim < 2:
        raise ValueError(f"g must have an axis of samples and one of channels; got {g.shape}.")
    if product not in get_args(Product):
        raise ValueError(f"product must be 'input' or 'weight'; got {product!r}.")
    g = g.reshape(g.shape[0], -1, g.shape[-1])
    grouping = quantizer.grouping(product)
    axis = _AXES[grouping.pruned]
    p = group_probabilities(g, quantizer, axis)
    squares = np.sum(np.moveaxis(g, axis, 0).reshape(p.size, -1) ** 2, axis=1)
    mask, bias = _mask_and_bias(p, squares, quantizer.sampler)
    own_scale = None if grouping.one_scale else _AXES[grouping.scaled]

    def rounded_entries(values: Float) -> Float:
        return rounding_variance(values, quantizer.bits, own_scale, grid=quantizer.grid)

    if grouping.scaled == grouping.pruned:
        entries = np.moveaxis(rounded_entries(g), axis, 0)
        rounded = entries.reshape(p.size, -1).sum(axis=1)
        rounding = float(np.sum(p * quantizer.sampler.weights(p) ** 2 * rounded))
        return GradientError(rounding, mask, bias)
    rounding = 0.0
    g = np.moveaxis(g, axis, 0)
    for probability, weights in zip(
        *quantizer.sampler.outcomes(p, draws=selections, seed=seed), strict=True
    ):
        folded = weights[weights > 0, None, None] * g[weights > 0]
        if folded.size:
            variance = rounded_entries(np.moveaxis(folded, 0, axis))
            rounding += probability * float(variance.sum())
    return GradientError(rounding, mask, bias)


def _mask_and_bias(p: Float, squares: Float, sampler: Sampler) -> tuple[float, float]:
    """The terms of dropping groups, from the probabilities and squared norms of all groups."""
    of_mean = np.where(p > 0, 1.0, 0.0) if sampler.rescales else p  # E[weight], exactly
    mask = np.sum((1 - p) * of_mean * sampler.weights(p) * squares)
    return float(mask), float(np.sum((1 - of_mean) ** 2 * squares))


def per_tensor_bound(g: npt.ArrayLike, bits: int) -> float:
    r"""Published bound for one scale over all: :math:`N D R^2 / (4 B^2)`.

    ``N D`` is the number of entries. It bounds :func:`gradient_error` with ``groups="tensor"`` and
    nothing pruned. (arXiv 2408.14267, section 4.)
    """
    g = np.asarray(g, np.float64)
    return float(g.size * np.ptp(g) ** 2 / (4 * (2**bits - 1) ** 2))


def per_sample_bound(g: npt.ArrayLike, bits: int) -> float:
    r"""Published bound for one scale a sample: :math:`\frac{D}{4 B^2} \sum_i R_i^2`.

    ``D`` is the number of entries of a sample. It bounds :func:`gradient_error` with nothing
    pruned, and never exceeds :func:`per_tensor_bound`. (arXiv 2408.14267, section 4.)
    """
    rows = _rows(g)
    return float(rows.shape[1] * np.sum(np.ptp(rows, axis=1) ** 2) / (4 * (2**bits - 1) ** 2))


def published_agp_bound(g: npt.ArrayLike, bits: int, keep: float | None = None) -> float:
    r"""Published expression for AGP: :math:`\frac{D}{4 B^2} \sum_{i \le k} R_i^2`, k largest.

    It is the bound on the rounding of the ``k`` samples of largest range, and no bound on the
    error of the pruned gradient: it leaves out the mask term,
    :math:`\sum_i \frac{1 - p_i}{p_i} \lVert g_i \rVert^2`, and the weights :math:`1 / p_i` that
    scale the kept samples' rounding. :func:`agp_bound` has both. (arXiv 2408.14267, section 4.1.)
    """
    rows = _rows(g)
    k = GradientQuantizer(bits=bits, keep=keep).kept(rows.shape[0])
    largest = np.sort(np.ptp(rows, axis=1))[::-1][:k]
    return float(rows.shape[1] * np.sum(largest**2) / (4 * (2**bits - 1) ** 2))


def agp_bound(g: npt.ArrayLike, quantizer: GradientQuantizer) -> float:
    r"""Bound on the error of AGP over samples, with what the published one leaves out.

    .. math:: \sum_i \left[\frac{D R_i^2}{4 B^2 p_i} + \frac{1 - p_i}{p_i} \lVert g_i \rVert^2
       \right]

    Only the rounding is bounded; the mask term is exact. For the unbiased samplers.

    Raises:
      ValueError: the sampler is biased.

    Example:
      >>> import numpy as np
      >>> from fqt_jax import GradientQuantizer
      >>> g, quantizer = np.random.default_rng(0).normal(size=(16, 50)), GradientQuantizer(bits=4)
      >>> exact, bound = gradient_error(g, quantizer).total, agp_bound(g, quantizer)
      >>> published_agp_bound(g, bits=4) < exact <= bound
      True
    """
    if not quantizer.sampler.unbiased:
        raise ValueError(
            f"the bound is for unbiased samplers; {str(quantizer.sampler)!r} is biased."
        )
    rows = _rows(g)
    p = group_probabilities(rows, quantizer, axis=0)
    one_scale = quantizer.grouping("input").one_scale
    scaled = rows.reshape(1, -1) if one_scale else rows
    ranges = GRIDS[quantizer.grid](scaled.min(axis=1), scaled.max(axis=1), quantizer.bits)[1]
    rounding = np.sum(np.broadcast_to(ranges**2, p.shape) * quantizer.sampler.weights(p))
    mask, _ = _mask_and_bias(p, np.sum(rows**2, axis=1), quantizer.sampler)
    return float(rows.shape[1] * rounding / (4 * (2**quantizer.bits - 1) ** 2)) + mask


def _rows(g: npt.ArrayLike) -> Float:
    g = np.asarray(g, np.float64)
    return g.reshape(g.shape[0], -1)
