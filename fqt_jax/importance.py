"""What a group of a gradient weighs: the quantities that keep probabilities can go by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class GroupStatistics:
    """What is known of each of ``n`` groups of a gradient.

    Attributes:
      lo, hi: minimum and maximum, ``float32[n]``.
      squares: gives the sum of squares, ``float32[n]``, up to a factor that all groups share. It
        takes a pass over the gradient of its own, and is called only where it is needed.
    """

    lo: jax.Array
    hi: jax.Array
    squares: Callable[[], jax.Array]

    @classmethod
    def of_rows(cls, rows: jax.Array) -> GroupStatistics:
        """Of a gradient ``[n, entries]`` whose groups are its rows."""
        lo, hi = jnp.min(rows, axis=1), jnp.max(rows, axis=1)
        largest = jnp.max(jnp.maximum(-lo, hi))
        return cls(lo, hi, lambda: sum_of_squares(rows, largest, axis=1))


def range_with_zero(groups: GroupStatistics) -> jax.Array:
    """The range of a group taken together with zero, ``max(hi, 0) - min(lo, 0)``.

    The same as the range for groups with entries of both signs, and positive for a constant group
    that is not zero, which would otherwise never be kept.
    """
    return jnp.maximum(groups.hi, 0.0) - jnp.minimum(groups.lo, 0.0)


def norm(groups: GroupStatistics) -> jax.Array:
    """The Euclidean norm of a group, up to a common factor."""
    return jnp.sqrt(groups.squares())


def largest_entry(groups: GroupStatistics) -> jax.Array:
    """``max(abs(g))`` of a group."""
    return jnp.maximum(jnp.abs(groups.lo), jnp.abs(groups.hi))


IMPORTANCES: dict[str, Callable[[GroupStatistics], jax.Array]] = {
    "range": range_with_zero,
    "norm": norm,
}
"""The choices of ``GradientQuantizer.importance``."""

# A type checker cannot follow the table; what reads types at run time, such as a command line, can.
if TYPE_CHECKING:
    Importance = str
else:
    Importance = Literal[tuple(IMPORTANCES)]


def sum_of_squares(g: jax.Array, largest: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """Sum of ``(g / largest)^2``: relative, since squares of small gradients would underflow."""
    inverse = 1.0 / jnp.maximum(largest, jnp.float32(jnp.finfo(jnp.float32).tiny))
    return jnp.sum(jnp.square(g * inverse), axis=axis)
