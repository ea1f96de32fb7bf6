"""What a sampler is: probabilities and a draw, and what theory asks about the two."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import ClassVar

import jax
import numpy as np
import numpy.typing as npt

from fqt_jax.importance import IMPORTANCES, GroupStatistics, Importance
from fqt_jax.samplers.probabilities import keep_probabilities
from fqt_jax.selection import Selection

Float = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    r"""Draws ``k`` of ``n`` groups, group ``i`` with probability :math:`p_i`, :math:`\sum p_i = k`.

    One of one's own is a frozen dataclass that derives from this class, or from a sampler that
    does most of it already. It needs :meth:`draw`; its probabilities are the water-filled
    importance unless it has others, and theory averages over its draws unless it knows better.

    Attributes:
      rescales: whether a kept group is multiplied by :math:`1 / p_i`, rather than by one.
      exact: whether each draw keeps exactly ``k`` groups. Otherwise a draw has ``n`` slots, of
        which a random number is used, and the rest has weight zero: every product then takes the
        time of all groups.

    Example:
      >>> import dataclasses
      >>> import fqt_jax as fqt
      >>> @dataclasses.dataclass(frozen=True)
      ... class Floored(fqt.samplers.Systematic):
      ...     floor: float = 0.1  # of the mean importance, so that no weight is very large
      ...
      ...     def probabilities(self, importance, k):
      ...         return super().probabilities(importance + self.floor * importance.mean(), k)
      >>> quantizer = fqt.GradientQuantizer(bits=4, sampler=Floored(0.5))
      >>> print(fqt.Recipe(gradient=quantizer))
      binary, 4-bit gradients of 25% (floored(floor=0.5), channels)
      >>> g = [[4.0], [-1.0], [0.0], [0.0]]
      >>> fqt.theory.group_probabilities(g, quantizer, axis=0).round(3)
      array([0.617, 0.217, 0.083, 0.083])
    """

    rescales: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    @property
    def unbiased(self) -> bool:
        """Whether the pruned gradient is the gradient on average: that is what rescaling is for."""
        return self.rescales

    def __str__(self) -> str:
        """Its name, and its options if it has any."""
        options = [f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self)]
        name = type(self).__name__.lower()
        return f"{name}({', '.join(options)})" if options else name

    def measure(self, groups: GroupStatistics, importance: Importance) -> jax.Array:
        """What the probabilities go by, ``float32[n]``: the importance that a recipe asks for."""
        return IMPORTANCES[importance](groups)

    def probabilities(self, importance: jax.Array, k: int) -> jax.Array:
        """The keep probabilities ``p``, ``float32[n]``, whose sum is ``k``.

        Args:
          importance: ``float32[n]``, not negative (:meth:`measure`).
          k: number of groups to keep; static.
        """
        return keep_probabilities(importance, k)

    @abc.abstractmethod
    def draw(self, p: jax.Array, k: int, seed: jax.Array) -> Selection:
        """Draws groups, each with its probability; runs under ``jit`` and ``vmap``.

        Args:
          p: :meth:`probabilities`. Where they are NaN, the weights of what is kept must be NaN, so
            that a NaN in a gradient is never pruned away.
          k: their sum; static.
          seed: ``uint32[2]``, for :func:`fqt_jax.rounding.counter_bits`.

        Returns:
          A selection of ``k`` slots if the sampler is exact, else of ``n``.
        """

    def weights(self, p: Float) -> Float:
        """What each group is multiplied by where it is kept, ``float64[n]``."""
        return 1 / np.where(p > 0, p, np.inf) if self.rescales else np.ones_like(p)

    def outcomes(self, p: Float, *, draws: int = 256, seed: int = 0) -> tuple[Float, Float]:
        """Outcomes of the draw with their probabilities: ``draws`` drawn ones, or all there are.

        Args:
          p: keep probabilities, ``float64[n]``.
          draws: outcomes to draw where there are too many to list.
          seed: of these.

        Returns:
          ``(probability, weights)`` of ``m`` outcomes: ``[m]``, and the groups' weights in each,
          ``[m, n]``, zero where they are dropped.
        """
        if np.all((p == 0) | (p == 1)):
            return np.ones(1), p[None]
        seeds = np.random.default_rng(seed).integers(0, 2**32, (draws, 2), np.uint32)
        weights = _draw_many(np.asarray(p, np.float32), seeds, self, round(p.sum()))
        return np.full(draws, 1 / draws), np.asarray(weights, np.float64)

    def sum_variance(self, terms: Float, p: Float) -> float:
        """Variance of a sum over sampled groups (:func:`fqt_jax.theory.sampled_sum_variance`).

        Args:
          terms: ``u``, ``float64[n, entries]``.
          p: keep probabilities, ``float64[n]``, positive where ``u`` is not zero.
        """
        probability, weights = self.outcomes(p, draws=10_000)
        deviations = weights @ terms - terms.sum(axis=0)
        return float(np.sum(probability * np.sum(deviations**2, axis=1)))


@functools.partial(jax.jit, static_argnames=("sampler", "k"))
def _draw_many(p: jax.Array, seeds: jax.Array, sampler: Sampler, k: int) -> jax.Array:
    return jax.vmap(lambda seed: sampler.draw(p, k, seed).expand())(seeds)
