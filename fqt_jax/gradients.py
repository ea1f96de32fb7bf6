"""Gradients of a model's loss: of the whole batch, or of rows drawn once for the whole network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fqt_jax.functional import RESIDUAL_NAMES
from fqt_jax.layer_types import quantized_layers
from fqt_jax.norms import RowNorm
from fqt_jax.pruning import draw
from fqt_jax.recipe import GradientQuantizer
from fqt_jax.rounding import seeds_from_key

LossesOf = Callable[[jax.Array, jax.Array], jax.Array]
"""``(logits, labels) -> losses``, one for each sample."""


@dataclasses.dataclass(frozen=True)
class OneDraw:
    r"""Prunes once for the whole network: one draw of samples a step, at the loss.

    A full forward pass, of which nothing is kept, gives the logits and the batch statistics. Of
    the ``n`` samples, ``k = max(1, round(keep * n))`` are drawn with probabilities proportional to
    :math:`\lVert \partial \ell_i / \partial z_i \rVert + \mathrm{floor}`, and all the rest runs on
    those rows alone: a forward pass that uses the statistics of the full one, and a backward pass
    in which the layers quantize gradients at their bits and prune no further. The loss of row
    ``i`` has the weight :math:`1 / (n p_i)`.

    Without norms that couple samples, the gradient is unbiased. The part that flows through batch
    norm's statistics is estimated from the drawn rows (:class:`fqt_jax.norms.RowNorm`), a product
    of two estimates from one draw: that leaves a bias of the order ``1 / k``.

    Args:
      keep: fraction of the samples that is drawn, in (0, 1].
      floor: added to each norm, so that no weight exceeds ``n / k`` by much.
    """

    keep: float = 0.25
    floor: float = 0.14

    def __post_init__(self) -> None:
        GradientQuantizer(keep=self.keep)
        if not 0 <= self.floor < float("inf"):
            raise ValueError(f"floor must be a number from 0 on; got {self.floor}.")

    def kept(self, n: int) -> int:
        """Number of rows drawn out of ``n``."""
        return GradientQuantizer(keep=self.keep).kept(n)


def _forward(
    graphdef: Any, params: Any, others: Any, x: jax.Array, prepare: Callable[[Any], None]
) -> tuple[jax.Array, Any]:
    """Logits, and the model's other state after the pass."""
    model = nnx.merge(graphdef, params, others, copy=True)
    model.train()
    prepare(model)
    logits = model(x)
    return logits, nnx.split(model, nnx.Param, ...)[2]


def _differentiable(
    graphdef: Any, prepare: Callable[[Any], None], remat: bool
) -> Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]:
    forward = functools.partial(_forward, graphdef, prepare=prepare)
    if not remat:
        return forward
    policy = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
    return jax.checkpoint(forward, policy=policy)


class Gradients(NamedTuple):
    """What a backward pass gives: ``grads`` of the parameters, ``logits`` of the whole batch and
    the model's ``others``, batch statistics and random streams, after it.
    """

    grads: Any
    logits: jax.Array
    others: Any


def batch_gradients(
    graphdef: Any,
    params: Any,
    others: Any,
    x: jax.Array,
    y: jax.Array,
    losses_of: LossesOf,
    *,
    remat: bool = False,
) -> Gradients:
    """Gradient of the batch's mean loss.

    Args:
      graphdef, params, others: the model, split.
      x: the batch, ``[N, ...]``.
      y: its labels, ``int[N]``.
      losses_of: the loss.
      remat: keep only what quantized layers name
        (:data:`fqt_jax.functional.RESIDUAL_NAMES`) and compute the rest again.
    """
    forward = _differentiable(graphdef, lambda model: None, remat)

    def objective(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        logits, after = forward(params, others, x)
        return jnp.mean(losses_of(logits, y)), (logits, after)

    grads, (logits, after) = jax.grad(objective, has_aux=True)(params)
    return Gradients(grads, logits, after)


def drawn_gradients(
    graphdef: Any,
    params: Any,
    others: Any,
    x: jax.Array,
    y: jax.Array,
    losses_of: LossesOf,
    one_draw: OneDraw,
    key: jax.Array,
    *,
    remat: bool = False,
) -> Gradients:
    """Estimate of the same gradient from rows drawn once; see :class:`OneDraw`.

    Args:
      graphdef, params, others, x, y, losses_of, remat: as in :func:`batch_gradients`.
      one_draw: how many rows are drawn, and how.
      key: JAX random key of the draw.
    """
    n = x.shape[0]
    momenta: list[float] = []

    def keep_batch_statistics(model: Any) -> None:
        # With no momentum, the running statistics become those of this batch.
        for norm in _batch_norms(model):
            momenta.append(norm.momentum)
            norm.momentum = 0.0

    def use_batch_statistics(model: Any) -> None:
        for norm in _batch_norms(model):
            if type(norm) is nnx.BatchNorm and norm.axis == -1:
                RowNorm.take_over(norm, drawn.weights * (one_draw.kept(n) / n))
            else:
                norm.use_running_average = True
        for place in quantized_layers(model):
            place.module.recipe = place.module.recipe.unpruned()

    logits, of_batch = _forward(graphdef, params, others, x, keep_batch_statistics)
    errors = jax.vmap(jax.grad(lambda z, label: losses_of(z[None], label[None])[0]))(logits, y)
    importance = jnp.linalg.norm(errors, axis=-1) + one_draw.floor
    (seed,) = seeds_from_key(key, 1)
    drawn = draw(importance, one_draw.kept(n), "systematic", seed)
    rows, labels = jnp.take(x, drawn.indices, axis=0), jnp.take(y, drawn.indices, axis=0)
    forward = _differentiable(graphdef, use_batch_statistics, remat)

    def objective(params: Any) -> jax.Array:
        row_logits, _ = forward(params, of_batch, rows)
        return jnp.sum(drawn.weights * losses_of(row_logits, labels)) / n

    grads = jax.grad(objective)(params)
    model, before = (nnx.merge(graphdef, params, o, copy=True) for o in (of_batch, others))
    for norm, old, momentum in zip(_batch_norms(model), _batch_norms(before), momenta, strict=True):
        for new_value, old_value in ((norm.mean, old.mean), (norm.var, old.var)):
            new_value[...] = momentum * old_value[...] + (1 - momentum) * new_value[...]
    return Gradients(grads, logits, nnx.split(model, nnx.Param, ...)[2])


def _batch_norms(model: Any) -> list[Any]:
    return [norm for _, norm in nnx.iter_modules(model) if isinstance(norm, nnx.BatchNorm)]
