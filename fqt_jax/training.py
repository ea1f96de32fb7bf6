"""Training and evaluation steps: pure, jitted, with donated buffers and no host synchronization.

A model is split once into its static structure and a :class:`TrainState`. Everything that a step
needs or changes is in the state, random streams and running sums of the metrics included, so that
a run can stop after any step and continue with the same numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fqt_jax.binarize import check_float
from fqt_jax.gradients import OneDraw, batch_gradients, drawn_gradients

Images = jax.Array
Preprocess = Callable[[Images, jax.Array], jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "others", "opt_state", "step", "metrics"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes.

    Attributes:
      params: the trainable parameters (``nnx.Param``).
      others: everything else in the model: batch statistics, random streams.
      opt_state: state of the Optax optimizer.
      step: number of steps taken, ``int32``.
      metrics: running sums since :func:`reset_metrics`.
    """

    params: Any
    others: Any
    opt_state: Any
    step: jax.Array
    metrics: Metrics


class Metrics(NamedTuple):
    """Running sums, on the device: ``loss`` and ``correct`` over ``total`` images."""

    loss: jax.Array
    correct: jax.Array
    total: jax.Array

    @classmethod
    def zero(cls) -> Metrics:
        """Sums over no images."""
        return cls(*(jnp.zeros((), dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32)))

    def means(self) -> dict[str, float]:
        """Mean loss and accuracy, as Python numbers; waits for the device."""
        total = max(1, int(self.total))
        return {"loss": float(self.loss) / total, "accuracy": int(self.correct) / total}


def cross_entropy(logits: jax.Array, labels: jax.Array, *, smoothing: float = 0.0) -> jax.Array:
    r"""Softmax cross-entropy of each sample, with label smoothing.

    .. math:: -\sum_c q_c \log \mathrm{softmax}(z)_c, \qquad
       q = (1 - \epsilon)\, e_{label} + \epsilon / C

    Args:
      logits: ``[N, C]``, floating point.
      labels: ``int[N]``, in 0..C-1.
      smoothing: ``epsilon``, in [0, 1).

    Returns:
      ``[N]``, in nats.

    Raises:
      TypeError: ``logits`` is not a floating-point array.
      ValueError: ``smoothing`` is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), smoothing=0.1)
      Array([1.3862944], dtype=float32)
    """
    check_float("logits", logits)
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1); got {smoothing}.")
    log_p = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    if smoothing == 0:
        return -own
    return -(1 - smoothing) * own - smoothing * jnp.mean(log_p, axis=-1)


def create_state(
    model: nnx.Module, optimizer: optax.GradientTransformation
) -> tuple[Any, TrainState]:
    """Splits a model into its static structure and the state that training changes.

    Returns:
      ``(graphdef, state)``; :func:`merge_model` puts them together again.
    """
    graphdef, params, others = nnx.split(model, nnx.Param, ...)
    # Copies: a step donates its state, and the caller's model must survive it.
    params, others = jax.tree.map(jnp.copy, (params, others))
    opt_state = jax.jit(optimizer.init)(params)
    return graphdef, TrainState(params, others, opt_state, jnp.zeros((), jnp.int32), Metrics.zero())


def merge_model(graphdef: Any, state: TrainState) -> Any:
    """The model with the parameters and statistics of ``state``."""
    return nnx.merge(graphdef, state.params, state.others, copy=True)


def reset_metrics(state: TrainState) -> TrainState:
    """The state with its running sums at zero."""
    return dataclasses.replace(state, metrics=Metrics.zero())


def make_train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    *,
    smoothing: float = 0.0,
    preprocess: Preprocess | None = None,
    one_draw: OneDraw | None = None,
    stratify: bool = False,
    remat: bool = False,
) -> Callable[[TrainState, Images, jax.Array, jax.Array, jax.Array], tuple[TrainState, jax.Array]]:
    """Builds the jitted training step.

    Args:
      graphdef: static structure of the model.
      optimizer: an Optax optimizer.
      smoothing: label smoothing.
      preprocess: ``(images, key) -> images``, run on the device inside the step: augmentation and
        normalization.
      one_draw: prune once for the whole network rather than in each layer.
      stratify: lay the batch out by label. The systematic sampler takes evenly from any stretch
        of neighbours, so every class then gets its share of the drawn samples; that stays unbiased
        and lowers the noise of their sum. Nothing else depends on the order, up to rounding.
      remat: keep from the forward pass only what quantized layers name, bits and integer sums
        (:data:`fqt_jax.fused.parts.RESIDUAL_NAMES`), and compute norms and activations again.

    Returns:
      ``step(state, images, labels, indices, key) -> (state, loss)``. ``images`` and ``labels`` are
      the whole training set on the device, ``indices`` ``int32[batch]`` picks the batch, so that
      no data cross from the host. ``key`` seeds preprocessing; it is folded with ``state.step``.
      ``loss`` is the batch's mean. The state is donated: do not use it again.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState, images: Images, labels: jax.Array, indices: jax.Array, key: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        y = jnp.take(labels, indices, axis=0)
        if stratify:
            order = jnp.argsort(y, stable=True)
            indices, y = indices[order], y[order]
        x = jnp.take(images, indices, axis=0)
        key = jax.random.fold_in(key, state.step)
        if preprocess is not None:
            x = preprocess(x, key)
        losses_of = functools.partial(cross_entropy, smoothing=smoothing)
        model = (graphdef, state.params, state.others)
        if one_draw is None:
            result = batch_gradients(*model, x, y, losses_of, remat=remat)
        else:
            draw_key = jax.random.fold_in(key, 1)
            result = drawn_gradients(*model, x, y, losses_of, one_draw, draw_key, remat=remat)
        updates, opt_state = optimizer.update(result.grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        loss = jnp.sum(losses_of(result.logits, y))
        metrics = _add(state.metrics, loss, result.logits, y, jnp.ones(y.shape, jnp.bool_))
        new = TrainState(params, result.others, opt_state, state.step + 1, metrics)
        return new, loss / y.shape[0]

    return step


def make_eval_step(
    graphdef: Any, *, preprocess: Callable[[Images], jax.Array] | None = None
) -> Callable[[TrainState, Metrics, Images, jax.Array, jax.Array], Metrics]:
    """Builds the jitted evaluation step: no labels smoothed, batch statistics fixed.

    Args:
      graphdef: static structure of the model.
      preprocess: ``images -> images``, run on the device inside the step.

    Returns:
      ``step(state, metrics, images, labels, indices) -> metrics``. Negative indices are padding
      and count for nothing, so that a last, shorter batch needs no compilation of its own.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    def step(
        state: TrainState,
        metrics: Metrics,
        images: Images,
        labels: jax.Array,
        indices: jax.Array,
    ) -> Metrics:
        valid = indices >= 0
        x = jnp.take(images, jnp.maximum(indices, 0), axis=0)
        y = jnp.take(labels, jnp.maximum(indices, 0), axis=0)
        if preprocess is not None:
            x = preprocess(x)
        model = nnx.merge(graphdef, state.params, state.others, copy=True)
        model.eval()
        logits = model(x)
        losses = cross_entropy(logits, y)
        loss = jnp.sum(jnp.where(valid, losses, jnp.float32(0)))
        return _add(metrics, loss, logits, y, valid)

    return step


def _add(
    metrics: Metrics, loss: jax.Array, logits: jax.Array, labels: jax.Array, valid: jax.Array
) -> Metrics:
    hits = (jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels) & valid
    return Metrics(
        metrics.loss + loss,
        metrics.correct + jnp.sum(hits, dtype=jnp.int32),
        metrics.total + jnp.sum(valid, dtype=jnp.int32),
    )
