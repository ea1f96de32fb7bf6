"""What an estimator is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from flax import nnx

from fqt_jax.batches import Part, default_inputs
from fqt_jax.losses import Loss


class SplitModel(NamedTuple):
    """A model taken apart, so that it can be run as a pure function of its parameters.

    Attributes:
      graphdef: static structure of the model.
      params: the trainable parameters (``nnx.Param``).
      others: everything else: batch statistics, random streams.
      inputs: ``batch -> input``, what of a batch the model is called with; a tuple is several
        arguments.
      axes: of the mesh along which the batch is one of several shards, if it is; collective
        operations take them (:func:`jax.lax.pmean`).
    """

    graphdef: Any
    params: Any
    others: Any
    inputs: Part = default_inputs
    axes: Any = None

    @classmethod
    def of(cls, model: nnx.Module, inputs: Part = default_inputs) -> SplitModel:
        """Takes a model apart."""
        graphdef, params, others = nnx.split(model, nnx.Param, ...)
        return cls(graphdef, params, others, inputs)

    def merge(self, others: Any = None) -> Any:
        """The model, put together again, with ``others`` in place of its own."""
        others = self.others if others is None else others
        return nnx.merge(self.graphdef, self.params, others, copy=True)

    def run(
        self, params: Any, others: Any, batch: Any, prepare: Callable[[Any], None] | None = None
    ) -> tuple[Any, Any]:
        """A forward pass in training mode.

        Args:
          params, others: in place of the model's own.
          batch: any pytree with one entry a sample along the first axes.
          prepare: changes the merged model, in place, before it is called.

        Returns:
          ``(outputs, others)``: what the model gives, and its other state after the pass.
        """
        model = nnx.merge(self.graphdef, params, others, copy=True)
        model.train()
        if prepare is not None:
            prepare(model)
        given = self.inputs(batch)
        outputs = model(*given) if isinstance(given, tuple) else model(given)
        return outputs, nnx.split(model, nnx.Param, ...)[2]


class Gradients(NamedTuple):
    """What a backward pass gives.

    Attributes:
      grads: of the parameters, of their structure.
      outputs: of the model for the whole batch.
      others: the model's other state, batch statistics and random streams, after the step.
    """

    grads: Any
    outputs: Any
    others: Any


class Estimator(Protocol):
    """Anything with this method. It runs inside ``jit``, so it must be a pure function."""

    def gradients(self, model: SplitModel, batch: Any, loss: Loss, key: jax.Array) -> Gradients:
        """Estimates the gradient of the batch's mean loss.

        Args:
          model: the model; :meth:`SplitModel.run` is its forward pass.
          batch: any pytree with one entry a sample along the first axes.
          loss: ``(outputs, batch) -> losses``, one number a sample, for any part of the batch.
          key: JAX random key of this step, for what the estimator draws.
        """
