r"""Which part of its gradient each layer keeps, where its bits are those of the whole model.

A layer that keeps the fraction :math:`k` of its groups makes the squared error that it is handed
about :math:`1/k` times as large, and hands it down. What comes out below has grown by
:math:`\prod_l 1 / k_l`. With :math:`e_l` entries of :math:`b_l` bits, layer :math:`l` spends
:math:`b_l e_l k_l` of them; of all :math:`k` that spend the same altogether, the product is least
where every layer spends as much as every other, or keeps all that it has:

.. math:: k_l = \min\Big(1,\ \frac{c}{b_l e_l}\Big) .

In a convolutional network the last layers have a thirtieth of the entries of the first. They keep
all for next to nothing (``docs/estimators.md``, section 9).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from fqt_jax.recipe import Recipe
from fqt_jax.tapping import LayerCall

Budget = Literal["layer", "model"]
"""What spends the bits of a recipe: each layer, or the model as a whole."""


def count_entries(calls: Iterable[LayerCall]) -> dict[str, int]:
    """By path, the entries of a layer's output over all its calls
    (:func:`fqt_jax.tapping.layer_calls`).

    Raises:
      ValueError: a layer is called inside of a loop, whose steps cannot be counted.
    """
    found: dict[str, int] = {}
    for call in calls:
        if call.is_inside:
            raise ValueError(
                f"budget='model' cannot count the entries of layer {call.path}: it is called "
                "inside of a loop, such as nnx.scan, or another transformation."
            )
        found[call.path] = found.get(call.path, 0) + math.prod(call.shape)
    return found


def share(recipes: Mapping[str, Recipe], entries: Mapping[str, int]) -> dict[str, Recipe]:
    """The recipes with other fractions to keep, which altogether spend as many bits as before.

    Args:
      recipes: by path. Those that keep all of their gradient, or leave it in float, stay.
      entries: of the layers in use; a recipe of another layer stays too.

    Returns:
      The recipes that changed.

    Example:
      >>> import fqt_jax as fqt
      >>> entries = {"first": 16384, "second": 4096, "third": 512}
      >>> shared = share(dict.fromkeys(entries, fqt.FQT1), entries)
      >>> {path: round(recipe.gradient.keep_fraction, 2) for path, recipe in shared.items()}
      {'first': 0.14, 'second': 0.58, 'third': 1.0}
    """
    gradients = {
        path: recipe.gradient
        for path, recipe in recipes.items()
        if entries.get(path) and recipe.prunes and recipe.gradient is not None
    }
    costs = np.array([q.bits * entries[path] for path, q in gradients.items()], float)
    before = np.array([q.keep_fraction for q in gradients.values()], float)
    keeps = np.minimum(1.0, _equal_part(costs, float(costs @ before)) / costs)
    return {
        path: dataclasses.replace(
            recipes[path], gradient=dataclasses.replace(quantizer, keep=float(keep))
        )
        for (path, quantizer), keep in zip(gradients.items(), keeps, strict=True)
    }


def _equal_part(costs: np.ndarray, total: float) -> float:
    """The ``c`` at which the sum of ``min(costs, c)`` is ``total``, less than that of all costs."""
    for i, cost in enumerate(np.sort(costs)):
        part = total / (len(costs) - i)
        if part <= cost:
            return part
        total -= cost
    return 0.0  # there are none
