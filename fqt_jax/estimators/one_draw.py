"""One draw of samples a step, for the whole network."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from fqt_jax.batches import batch_size, take
from fqt_jax.estimators.across import draw_across
from fqt_jax.estimators.base import Gradients, SplitModel
from fqt_jax.layer_types import quantized_layers
from fqt_jax.losses import Loss
from fqt_jax.norms import RowNorm
from fqt_jax.pruning import draw
from fqt_jax.rounding import seeds_from_key

Scope = Literal["shard", "batch"]
"""What one draw draws from on a mesh."""


@dataclasses.dataclass(frozen=True)
class OneDraw:
    r"""Prunes once for the whole network: one draw of samples a step, at the loss.

    A full forward pass, of which nothing is kept, gives the outputs and the batch statistics. Of
    the ``n`` samples, ``k = max(1, round(keep * n))`` are drawn with probabilities proportional to
    :math:`\lVert \partial \ell_i / \partial z_i \rVert + \mathrm{floor}`, where :math:`z_i` are all
    outputs for sample ``i``, and all the rest runs on those rows alone: a forward pass that uses
    the statistics of the full one, and a backward pass in which the layers quantize gradients at
    their bits and prune no further. The loss of row ``i`` has the weight :math:`1 / (n p_i)`.

    Where no layer couples samples, the gradient is unbiased. The part that flows through batch
    norm's statistics is estimated from the drawn rows (:class:`fqt_jax.norms.RowNorm`), a product
    of two estimates from one draw: that leaves a bias of the order ``1 / k``.

    What a model and a loss must be for that:

    - All outputs have one entry a sample along their first axis.
    - The loss of a sample depends on its own outputs only, and so does each layer's output on its
      own input, batch norm apart. **Another layer that lets samples meet, such as one that takes a
      mean over the batch, cannot be told from the rest, and gives a wrong gradient.**
    - Each batch norm is an :class:`flax.nnx.BatchNorm` of one axis that is called once in a pass,
      without a mask. A subclass may change what it is built with; one that computes something of
      its own is refused.
    - Random layers such as dropout draw anew in the second pass, which costs no bias where there
      is no batch norm.

    Args:
      keep: fraction of the samples that is drawn, in (0, 1].
      floor: added to each norm, so that no weight exceeds ``n / k`` by much.
      scope: what is drawn from on a mesh: each device's ``"shard"``, or the whole ``"batch"``,
        which needs synchronized statistics and moves the drawn rows
        (:func:`fqt_jax.estimators.across.draw_across`). On one device they are the same.

    Raises:
      TypeError, ValueError: ``keep``, ``floor`` or ``scope`` is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> model = SplitModel.of(nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0)))
      >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 3.0]])}
      >>> loss = lambda outputs, batch: outputs[:, 0]
      >>> found = OneDraw(keep=0.5).gradients(model, batch, loss, jax.random.key(0))
      >>> found.grads["kernel"][...].tolist()  # of one sample of two, drawn with probability 1/2
      [[0.0], [3.0]]
    """

    keep: float = 0.25
    floor: float = 0.14
    scope: Scope = "shard"

    def __post_init__(self) -> None:
        for field in ("keep", "floor"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{field} must be a number; got {value!r}.")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be in (0, 1]; got {self.keep}.")
        if not 0 <= self.floor < float("inf"):
            raise ValueError(f"floor must be a number from 0 on; got {self.floor}.")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope must be 'shard' or 'batch'; got {self.scope!r}.")

    def kept(self, n: int) -> int:
        """Number of rows drawn out of ``n``.

        Example:
          >>> OneDraw().kept(128)
          32
        """
        return min(n, max(1, math.floor(self.keep * n + 0.5)))

    def gradients(self, model: SplitModel, batch: Any, loss: Loss, key: jax.Array) -> Gradients:
        """See :meth:`fqt_jax.estimators.Estimator.gradients`.

        Raises:
          ValueError: a batch norm or an output is not as it must be.
        """
        n = batch_size(batch)
        is_across = self.scope == "batch" and model.axes is not None

        def keep_batch_statistics(module: Any) -> None:
            # With no momentum, the running statistics become those of this batch.
            for path, norm in _batch_norms(module):
                RowNorm.check(norm, path)
                if is_across and norm.axis_name is None:
                    raise ValueError(
                        "OneDraw(scope='batch') moves rows to other devices, which must normalize "
                        "them alike: statistics must be synchronized."
                    )
                norm.momentum = 0.0

        def use_batch_statistics(module: Any) -> None:
            for _, norm in _batch_norms(module):
                RowNorm.take_over(norm, weights * (len(weights) / n))
            for place in quantized_layers(module):
                place.module.recipe = place.module.recipe.unpruned()

        outputs, of_batch = model.run(model.params, model.others, batch, keep_batch_statistics)
        (seed,) = seeds_from_key(key, 1)
        importance = _error_norms(loss, outputs, batch, n) + self.floor
        if is_across:
            weights, rows = draw_across(importance, batch, self.kept, seed, model.axes)
        else:
            drawn = draw(importance, self.kept(n), "systematic", seed)
            weights, rows = drawn.weights, take(batch, drawn.indices)

        def objective(params: Any) -> jax.Array:
            row_outputs, _ = model.run(params, of_batch, rows, use_batch_statistics)
            return jnp.sum(weights * loss(row_outputs, rows)) / n

        grads = jax.grad(objective)(model.params)
        return Gradients(grads, outputs, _averaged(model, of_batch))


def _error_norms(loss: Loss, outputs: Any, batch: Any, n: int) -> jax.Array:
    """Of each sample, the norm of its loss's gradient with respect to all its outputs."""
    leaves, treedef = jax.tree.flatten(outputs)
    for leaf in leaves:
        if leaf.shape[:1] != (n,):
            raise ValueError(
                f"OneDraw needs outputs with one entry for each of the {n} samples; one has the "
                f"shape {leaf.shape}."
            )
    is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def total(floats: list[jax.Array]) -> jax.Array:
        rest = iter(floats)
        merged = [next(rest) if f else leaf for f, leaf in zip(is_float, leaves, strict=True)]
        return jnp.sum(loss(jax.tree.unflatten(treedef, merged), batch))

    errors = jax.grad(total)([leaf for f, leaf in zip(is_float, leaves, strict=True) if f])
    squares = [jnp.square(e.astype(jnp.float32)).reshape(n, -1).sum(axis=1) for e in errors]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def _averaged(model: SplitModel, of_batch: Any) -> Any:
    """The state after the pass over the batch, its statistics averaged with those before."""
    after, before = model.merge(of_batch), model.merge()
    for (_, norm), (_, old) in zip(_batch_norms(after), _batch_norms(before), strict=True):
        for new_value, old_value in ((norm.mean, old.mean), (norm.var, old.var)):
            new_value[...] = norm.momentum * old_value[...] + (1 - norm.momentum) * new_value[...]
    return nnx.split(after, nnx.Param, ...)[2]


def _batch_norms(model: Any) -> list[tuple[str, Any]]:
    return [
        ("/".join(map(str, path)), norm)
        for path, norm in nnx.iter_modules(model)
        if isinstance(norm, nnx.BatchNorm)
    ]
