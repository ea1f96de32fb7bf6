"""Systematic sampling: exactly ``k`` groups, with any probabilities, from one random number."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from fqt_jax import kernels
from fqt_jax.samplers.base import Float, Sampler
from fqt_jax.selection import Selection

_ROUNDING = 1e-6
"""Keep probabilities come as float32: their running sums are whole numbers only up to this."""


@dataclasses.dataclass(frozen=True)
class Systematic(Sampler):
    r"""Lays the probabilities end to end and keeps the groups in which ``u, u + 1, ...`` fall.

    Group ``i`` lies on the interval that ends at :math:`P_i = p_1 + \dots + p_i`, and ``u`` is
    uniform in [0, 1): exactly ``k`` points fall, one group each at most. The number of groups never
    varies, which is less variance than Bernoulli sampling has; which groups go together depends on
    their order.
    """

    def draw(self, p: jax.Array, k: int, seed: jax.Array) -> Selection:
        """One draw; see the class."""
        # Nothing of a draw has a derivative. Rounding of the probabilities can make the count k + 1
        # or k - 1, about once in 10^5 draws: the last is then dropped, or a slot has weight zero.
        return kernels.systematic(jax.lax.stop_gradient(p).astype("float32"), k, seed)

    def outcomes(self, p: Float, *, draws: int = 256, seed: int = 0) -> tuple[Float, Float]:
        r"""Every outcome, of which there are no more than groups; ``draws`` has no effect.

        The outcome changes only where ``u`` passes the fractional part of a :math:`P_i`.

        Raises:
          ValueError: the sum of ``p`` is not a whole number.

        Example:
          >>> import numpy as np
          >>> probability, weights = Systematic().outcomes(np.array([0.5, 0.75, 0.75]))
          >>> probability
          array([0.25, 0.25, 0.5 ])
          >>> (weights > 0).astype(int)
          array([[1, 1, 0],
                 [1, 0, 1],
                 [0, 1, 1]])
        """
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
        return np.diff(cuts), np.where(kept, self.weights(p), 0.0)
