"""Axes of an enclosing :func:`jax.shard_map` along which values vary."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def varying_axes(operands: Any) -> frozenset[str]:
    """Axes along which any of the arrays varies."""

    def axes(a: jax.Array) -> frozenset[str]:
        kind: Any = jax.typeof(a)
        return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma

    return frozenset[str]().union(*map(axes, jax.tree.leaves(operands)))


def vary(operands: Any, axes: frozenset[str]) -> Any:
    """The same arrays, varying along ``axes`` besides those along which they do."""

    def cast(a: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(a)))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(cast, operands)


def mean_over(tree: Any, axes: str | tuple[str, ...] | None) -> Any:
    """The mean over the devices along some axes, which varies as the arrays do; or the same."""
    if axes is None or tree is None:
        return tree
    return jax.tree.map(lambda a, m: vary(m, varying_axes(a)), tree, lax.pmean(tree, axes))


def varying_together(operands: Any) -> Any:
    """Makes all arrays vary along the same axes.

    A gradient rule of one's own must return cotangents that vary like its arguments, which those
    of shared weights would not. The transpose of this cast sums them over the devices.
    """
    return vary(operands, varying_axes(operands))
