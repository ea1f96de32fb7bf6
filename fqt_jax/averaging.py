"""The exponential moving average of the parameters, kept in the optimizer's state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AveragedState(NamedTuple):
    """State of an optimizer that averages the parameters.

    Attributes:
      optimizer: state of the optimizer itself.
      steps: number of steps averaged over.
      average: as the parameters.
    """

    optimizer: Any
    steps: jax.Array
    average: Any


def averaged_parameters(state: Any) -> Any:
    r"""The parameters to evaluate: their moving average where there is one, else the last ones.

    .. math:: \bar\theta_t = \frac{1 - \beta}{1 - \beta^t}
       \sum_{i=1}^{t} \beta^{t - i}\, \theta_i, \qquad \beta = \text{ema\_decay}

    Batch statistics are no part of it: they are moving averages of the training batches already.

    Args:
      state: a :class:`~fqt_jax.training.TrainState` of an optimizer of
        :class:`fqt_jax.optimizers.OptimizerConfig`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fqt_jax.training import Metrics, TrainState
      >>> from fqt_jax.optimizers import OptimizerConfig
      >>> config = OptimizerConfig("sgd", 1.0, momentum=0, weight_decay=0, schedule="constant",
      ...                          ema_decay=0.5)
      >>> params = {"w": jnp.zeros(())}
      >>> optimizer = config.build(params, 2)
      >>> opt_state = optimizer.init(params)
      >>> for _ in range(2):
      ...     updates, opt_state = optimizer.update({"w": jnp.full((), -3.0)}, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> state = TrainState(params, {}, opt_state, jnp.asarray(2), Metrics.zero())
      >>> float(params["w"]), float(averaged_parameters(state)["w"])  # of 3 and, twice as much, 6
      (6.0, 5.0)
    """
    if isinstance(state.opt_state, AveragedState):
        return state.opt_state.average
    return state.params


def averaging(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """The optimizer, with the average of :func:`averaged_parameters` in its state.

    Args:
      optimizer: the optimizer.
      decay: of the moving average, in (0, 1).

    Returns:
      A transformation of the same updates, with an :class:`AveragedState`.
    """

    def init(params: Any) -> AveragedState:
        # Zeros, which the first step replaces: a step donates its state, so nothing in it is twice.
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AveragedState(optimizer.init(params), jnp.zeros((), jnp.int32), zeros)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AveragedState]:
        updates, inner = optimizer.update(updates, state.optimizer, params)
        steps = optax.safe_increment(state.steps)
        new = optax.apply_updates(params, updates)
        # The bias of a start at zero is corrected here, so that the average needs no decay to read.
        # Both in float32, so that the first step's part is exactly 1.
        kept = jnp.float32(decay)
        part = (1 - kept) / (1 - kept**steps)
        average = jax.tree.map(lambda mean, x: mean + part * (x - mean), state.average, new)
        return updates, AveragedState(inner, steps, average)

    return optax.GradientTransformation(init, update)
