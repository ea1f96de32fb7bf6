"""Where the levels lie on which the entries of a group are rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np


def range_grid(lo: Any, hi: Any, bits: int) -> tuple[Any, Any]:
    """Levels from the least entry of a group to its greatest, both of which are exact.

    Example:
      >>> range_grid(np.float64(-1.0), np.float64(6.5), bits=4)
      (np.float64(-1.0), np.float64(7.5))
    """
    return lo, hi - lo


def zero_grid(lo: Any, hi: Any, bits: int) -> tuple[Any, Any]:
    r"""The finest equal steps that reach from ``lo`` to ``hi`` and have a level at zero.

    With :math:`B = 2^b - 1` steps, of which ``a`` are below zero, a step is

    .. math:: \Delta = \min_{0 \le a \le B} \max\Big(\frac{\max(-\mathrm{lo}, 0)}{a},
       \frac{\max(\mathrm{hi}, 0)}{B - a}\Big), \qquad \frac00 = 0,

    and the grid reaches from :math:`-a \Delta` to :math:`(B - a) \Delta`. An entry near zero is
    then rounded with a variance of at most :math:`\Delta\, |g|`, where between two levels it is up
    to :math:`\Delta^2 / 4` however small the entry. One of ``lo`` and ``hi`` is a level, so a group
    whose entries are all the same is exact.

    Args:
      lo, hi: minimum and maximum of each group, arrays of NumPy or JAX.
      bits: width of a code, at least 2: one bit has no level between two signs.

    Returns:
      The lowest level, and the distance of the highest from it: at least ``hi - lo``.

    Example:
      >>> zero_grid(np.float64(-1.0), np.float64(6.5), bits=4)  # 2 steps below zero and 13 above
      (np.float64(-1.0), np.float64(7.5))
      >>> zero_grid(np.float64(-1.0), np.float64(5.0), bits=4)  # 3 below and 12 above
      (np.float64(-1.25), np.float64(6.25))
    """
    xp = jnp if not isinstance(lo, np.ndarray | np.generic) else np
    steps = 2**bits - 1
    below, above = xp.maximum(-lo, 0), xp.maximum(hi, 0)
    span = below + above
    best = below / xp.where(span == 0, 1, span) * steps  # if it need not be a whole number
    fewer, more = (
        xp.clip(a, xp.where(below > 0, 1, 0), steps - xp.where(above > 0, 1, 0))
        for a in (xp.floor(best), xp.ceil(best))
    )

    def step(a: Any) -> Any:
        return xp.maximum(below / xp.maximum(a, 1), above / xp.maximum(steps - a, 1))

    a = xp.where(step(fewer) <= step(more), fewer, more)
    return -a * step(a), steps * step(a)


GRIDS: dict[str, Callable[[Any, Any, int], tuple[Any, Any]]] = {
    "range": range_grid,
    "zero": zero_grid,
}
"""The choices of ``GradientQuantizer.grid``: ``(lo, hi, bits) -> (lowest level, range)``."""

# A type checker cannot follow the table; what reads types at run time, such as a command line, can.
if TYPE_CHECKING:
    Grid = str
else:
    Grid = Literal[tuple(GRIDS)]
