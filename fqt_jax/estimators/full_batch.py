"""The gradient of the whole batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fqt_jax.estimators.base import Gradients, SplitModel
from fqt_jax.losses import Loss


@dataclasses.dataclass(frozen=True)
class FullBatch:
    """One forward and one backward pass of the whole batch, pruned and rounded as its layers say.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> model = SplitModel.of(nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0)))
      >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 3.0]])}
      >>> loss = lambda outputs, batch: outputs[:, 0]
      >>> found = FullBatch().gradients(model, batch, loss, jax.random.key(0))
      >>> found.grads["kernel"][...].tolist()
      [[0.5], [1.5]]
    """

    def gradients(self, model: SplitModel, batch: Any, loss: Loss, key: jax.Array) -> Gradients:
        """See :meth:`fqt_jax.estimators.Estimator.gradients`."""

        def objective(params: Any) -> tuple[jax.Array, tuple[Any, Any]]:
            outputs, others = model.run(params, model.others, batch)
            return jnp.mean(loss(outputs, batch)), (outputs, others)

        grads, (outputs, others) = jax.grad(objective, has_aux=True)(model.params)
        return Gradients(grads, outputs, others)
