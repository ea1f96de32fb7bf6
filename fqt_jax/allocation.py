r"""Which part of its gradient each layer keeps, where its bits are those of the whole model.

A layer that draws a fraction :math:`k` of its groups makes an error of about :math:`1/k` times the
square of its gradient, and hands it down: it enters the weight gradients of that layer and of all
in use before it. Let layer :math:`l` be the :math:`d_l`-th in use, with :math:`e_l` entries of
:math:`b_l` bits. Keeping the fraction :math:`k_l` of each takes :math:`\sum_l b_l e_l k_l` bits. Of
all fractions that take the same, these make the sum of errors, :math:`\sum_l d_l / k_l`, least:

.. math:: k_l = \min\Big(1,\ c \sqrt{\frac{d_l}{b_l e_l}}\Big) .

In a convolutional network the last layers have a thirtieth of the entries of the first: they keep
nearly all for next to nothing, and what they hand down is nearly exact (``docs/estimators.md``,
section 9).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from fqt_jax.recipe import Recipe
from fqt_jax.tapping import Call, tapped

Budget = Literal["layer", "model"]
"""What spends the bits of a recipe: each layer, or the model as a whole."""


class InUse(NamedTuple):
    """A layer in use.

    Attributes:
      place: how many layers are in use up to its first call, itself included.
      entries: of its output, over all calls.
    """

    place: int
    entries: int


def layers_in_use(model: nnx.Module, example: Any) -> dict[str, InUse]:
    """By path, the layers that a call of the model uses. Nothing is computed.

    Args:
      model: the model; it stays as it is.
      example: what it is called with, or the shape and type of that; a tuple is several arguments.

    Raises:
      ValueError: a layer is called inside of a loop, whose steps cannot be counted.
    """
    graphdef, state = nnx.split(model)
    inputs = example if isinstance(example, tuple) else (example,)
    found: dict[str, InUse] = {}

    def observe(path: str, layer: Any, x: jax.Array, call: Call) -> jax.Array:
        y = call()
        place, entries = found.get(path, InUse(len(found) + 1, 0))
        found[path] = InUse(place, entries + y.size)
        return y

    def refuse(path: str, layer: Any, x: jax.Array, call: Call) -> jax.Array:
        raise ValueError(
            f"budget='model' cannot count the entries of layer {path}: it is called inside of a "
            "loop, such as nnx.scan, or another transformation."
        )

    def run(state: Any, inputs: tuple[Any, ...]) -> Any:
        return tapped(nnx.merge(graphdef, state, copy=True), observe, refuse)(*inputs)

    jax.eval_shape(run, state, inputs)
    return found


def share(recipes: Mapping[str, Recipe], layers: Mapping[str, InUse]) -> dict[str, Recipe]:
    """The recipes, with what each keeps so that all together spend as many bits as before.

    Args:
      recipes: by path. Those that keep all of their gradient, or leave it in float, stay.
      layers: those in use; a recipe of another layer stays too.

    Returns:
      The recipes that changed.

    Example:
      >>> import fqt_jax as fqt
      >>> layers = {"first": InUse(2, 16384), "second": InUse(4, 2048)}
      >>> shared = share(dict.fromkeys(layers, fqt.FQT1), layers)
      >>> {path: round(recipe.gradient.keep_fraction, 3) for path, recipe in shared.items()}
      {'first': 0.188, 'second': 0.75}
    """
    gradients = {
        path: recipe.gradient
        for path, recipe in recipes.items()
        if path in layers
        and layers[path].entries
        and recipe.gradient is not None
        and recipe.gradient.keep_fraction < 1
    }
    if not gradients:
        return {}
    costs = np.array([q.bits * layers[path].entries for path, q in gradients.items()], float)
    places = np.array([layers[path].place for path in gradients], float)
    before = np.array([q.keep_fraction for q in gradients.values()])
    keeps = _fractions(np.sqrt(places / costs), costs, float(costs @ before))
    return {
        path: dataclasses.replace(
            recipes[path], gradient=dataclasses.replace(quantizer, keep=float(keep))
        )
        for (path, quantizer), keep in zip(gradients.items(), keeps, strict=True)
    }


def _fractions(shares: np.ndarray, costs: np.ndarray, total: float) -> np.ndarray:
    """``min(1, c shares)`` with the ``c`` at which they cost ``total``, less than all do."""
    is_whole = np.zeros(len(shares), bool)
    while True:
        rest = ~is_whole
        c = (total - costs[is_whole].sum()) / (costs[rest] @ shares[rest])
        exceeds = rest & (c * shares >= 1)
        if not exceeds.any():
            return np.where(is_whole, 1.0, c * shares)
        is_whole |= exceeds
