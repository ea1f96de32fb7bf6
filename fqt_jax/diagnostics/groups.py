"""How unlike the groups of a gradient are, and how many weights change sign."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from fqt_jax.tree import leaf_name

Float = npt.NDArray[np.float64]


def group_ranges(g: npt.ArrayLike, axis: int = 0) -> Float:
    """Range, maximum minus minimum, of each group of a gradient.

    Args:
      g: gradient.
      axis: the axis that tells the groups apart: 0 for samples, -1 for output channels.

    Example:
      >>> group_ranges([[1.0, -1.0], [0.5, 0.25]], axis=0)
      array([2.  , 0.25])
    """
    g = np.asarray(g, np.float64)
    reduced = tuple(a for a in range(g.ndim) if a != axis % g.ndim)
    return np.asarray(np.ptp(g, axis=reduced))


def lorenz_curve(sizes: npt.ArrayLike) -> tuple[Float, Float]:
    """Share of the total that the smallest groups have, over their share of the number.

    The diagonal means that all groups are alike; the further below it, the more a few groups
    hold. Groups that are all zero count as alike.

    Args:
      sizes: of the groups, ``[n]``, not negative.

    Returns:
      ``(part of the groups, part of the total)``, both ``[n + 1]``, from 0 to 1.

    Raises:
      ValueError: there are no groups, or a size is negative or not a number.

    Example:
      >>> part, share = lorenz_curve([6.0, 1.0, 2.0, 1.0])
      >>> share
      array([0. , 0.1, 0.2, 0.4, 1. ])
    """
    ordered = np.sort(_sizes(sizes))
    n = ordered.size
    part = np.linspace(0, 1, n + 1)
    total = ordered.sum()
    if total == 0:
        return part, part
    return part, np.concatenate([[0.0], np.cumsum(ordered) / total])


def effective_groups(sizes: npt.ArrayLike) -> float:
    r"""Effective number of groups, :math:`(\sum_i R_i)^2 / \sum_i R_i^2`.

    From 1, where one group holds everything, to n, where all are alike (which includes all zero).
    Pruning to k groups loses little where this is well below k.

    Args:
      sizes: of the groups, ``[n]``, not negative.

    Raises:
      ValueError: as for :func:`lorenz_curve`.

    Example:
      >>> effective_groups([1.0, 1.0, 1.0, 1.0]), effective_groups([1.0, 0.0, 0.0, 0.0])
      (4.0, 1.0)
    """
    sizes = _sizes(sizes)
    largest = sizes.max()
    if largest == 0:
        return float(sizes.size)
    relative = sizes / largest
    return float(relative.sum() ** 2 / np.sum(relative**2))


def _sizes(sizes: npt.ArrayLike) -> Float:
    values = np.asarray(sizes, np.float64).reshape(-1)
    if values.size == 0:
        raise ValueError("there are no groups.")
    if not np.all(values >= 0):
        raise ValueError("sizes of groups must not be negative, nor NaN.")
    return values


def sign_flip_ratio(before: Any, after: Any, pattern: str = r".*kernel") -> dict[str, float]:
    """Part of the weights whose sign differs between two parameter trees, leaf by leaf.

    A binary layer computes with signs alone, so this is how much of it changed. As everywhere,
    the sign of zero is +1. (The flip ratio that binary-network tools report.)

    Args:
      before, after: trees of the same structure, such as ``state.params`` at two times.
      pattern: regular expression that matches the names of the leaves to compare; names are
        joined by dots.

    Returns:
      The ratio by the leaves' names, in [0, 1].

    Raises:
      ValueError: the trees do not fit each other, or no leaf matches.

    Example:
      >>> import jax.numpy as jnp
      >>> before = {"conv": {"kernel": jnp.array([1.0, -1.0, 0.0, 2.0])}}
      >>> after = {"conv": {"kernel": jnp.array([0.5, 1.0, 3.0, -0.1])}}
      >>> sign_flip_ratio(before, after)
      {'conv.kernel': 0.5}
    """
    old = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(before)}
    new = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(after)}
    if old.keys() != new.keys() or any(old[n].shape != new[n].shape for n in old):
        raise ValueError("the two trees differ in their names or shapes.")
    names = [name for name in old if re.fullmatch(pattern, name) and old[name].size]
    if not names:
        raise ValueError(f"no leaf's name matches {pattern!r}. Names: {', '.join(old)}.")
    return {name: float(np.mean(_flips(old[name], new[name]))) for name in names}


def _flips(before: Any, after: Any) -> npt.NDArray[np.bool_]:
    return (np.asarray(before) >= 0) != (np.asarray(after) >= 0)
