"""Training and evaluation steps: pure, jitted, with donated buffers and no host synchronization.

A model is split once into its static structure and a :class:`TrainState`. Everything that a step
needs or changes is in the state, random streams and running sums of the metrics included, so that
a run can stop after any step and continue with the same numbers.

A batch is any pytree of arrays that share their first axis, one entry a sample. What of it the
model is called with is the first entry of ``(x, y)`` or the entry ``"image"``, ``"x"`` or
``"inputs"`` of a dictionary, or whatever ``inputs=`` says
(:func:`fqt_jax.batches.default_inputs`). The loss and the metrics are functions of the model's
outputs and the batch, and give one number a sample.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from fqt_jax.batches import Padded as Padded
from fqt_jax.batches import Part, batch_size, default_inputs
from fqt_jax.batches import pad_batch as pad_batch
from fqt_jax.estimators.base import Estimator, SplitModel
from fqt_jax.estimators.full_batch import FullBatch
from fqt_jax.exchange import Exchange, Mean
from fqt_jax.losses import CrossEntropy as CrossEntropy
from fqt_jax.losses import Loss
from fqt_jax.mesh import axes_of, by_sample, replicate, whole
from fqt_jax.metrics import Metric, check_names, check_per_sample, evaluate_metrics
from fqt_jax.metrics import Metrics as Metrics
from fqt_jax.shards import Shard, Statistics
from fqt_jax.steps import EvalStep, TrainStep
from fqt_jax.steps import gather_on_device as gather_on_device

NO_METRICS: Mapping[str, Metric] = MappingProxyType({})


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "others", "opt_state", "step", "metrics", "exchange"],
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
      exchange: what each device of a mesh keeps for the exchange of gradients
        (:mod:`fqt_jax.exchange`), along a first axis of the devices; mostly nothing.
    """

    params: Any
    others: Any
    opt_state: Any
    step: jax.Array
    metrics: Metrics
    exchange: Any = ()


def create_state(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    metrics: Iterable[str] = (),
    *,
    exchange: Exchange = Mean(),
    mesh: Mesh | None = None,
) -> tuple[Any, TrainState]:
    """Splits a model into its static structure and the state that training changes.

    Args:
      model: any Flax NNX module.
      optimizer: an Optax optimizer.
      metrics: the names of the metrics that the training step sums besides the loss; the
        dictionary that :func:`make_train_step` takes serves.
      exchange, mesh: those that :func:`make_train_step` is given.

    Returns:
      ``(graphdef, state)``; :func:`merge_model` puts them together again.

    Raises:
      ValueError: a metric is called ``"loss"``.
    """
    graphdef, params, others = nnx.split(model, nnx.Param, ...)
    # Copies: a step donates its state, and the caller's model must survive it.
    params, others = jax.tree.map(jnp.copy, (params, others))
    opt_state = jax.jit(optimizer.init)(params)
    zero = Metrics.zero(metrics)
    kept = () if mesh is None else exchange.init(params, mesh.size)
    return graphdef, TrainState(params, others, opt_state, jnp.zeros((), jnp.int32), zero, kept)


def place_state(state: TrainState, mesh: Mesh) -> TrainState:
    """A state laid out on the devices of a mesh, as its steps take it.

    With several processes each gives the same values.
    """
    own = jax.tree.map(
        lambda a: jax.make_array_from_callback(a.shape, by_sample(mesh), np.asarray(a).__getitem__),
        state.exchange,
    )
    return dataclasses.replace(
        replicate(dataclasses.replace(state, exchange=()), mesh), exchange=own
    )


def merge_model(graphdef: Any, state: TrainState) -> Any:
    """The model with the parameters and statistics of ``state``."""
    return nnx.merge(graphdef, state.params, state.others, copy=True)


def reset_metrics(state: TrainState) -> TrainState:
    """The state with its running sums at zero."""
    # Zeros that lie where the sums did: elsewhere they would be another program's.
    return dataclasses.replace(state, metrics=jax.tree.map(jnp.zeros_like, state.metrics))


def make_train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss,
    estimator: Estimator = FullBatch(),
    metrics: Mapping[str, Metric] = NO_METRICS,
    inputs: Part = default_inputs,
    preprocess: Callable[[Any, jax.Array], Any] | None = None,
    mesh: Mesh | None = None,
    statistics: Statistics = "synchronized",
    exchange: Exchange = Mean(),
) -> TrainStep:
    """Builds the training step.

    Args:
      graphdef: static structure of the model.
      optimizer: an Optax optimizer.
      loss: ``(outputs, batch) -> losses``, one number a sample; its mean is what is trained on.
        :class:`CrossEntropy` also checks labels.
      estimator: of the gradient: that of the whole batch, or
        :class:`~fqt_jax.estimators.OneDraw`, or another (:mod:`fqt_jax.estimators`).
      metrics: by name, what is summed besides the loss: ``(outputs, batch) -> values``, one number
        a sample, or ``(sums, counts)`` (:data:`fqt_jax.metrics.Metric`). The state must have been
        created with the same names.
      inputs: ``batch -> input``: what of a batch the model is called with; a tuple is several
        arguments.
      preprocess: ``(batch, key) -> batch``, run on the device inside the step: augmentation and
        normalization.
      mesh: devices that share each batch out among them, such as :func:`fqt_jax.mesh.data_mesh`;
        ``None`` for one device. Each draws and rounds its shard with random streams of its own.
      statistics: what batch norms normalize a shard with on a mesh: those of the whole batch,
        ``"synchronized"``, or the shard's own, ``"local"``. The running ones are the same on all
        devices either way.
      exchange: how devices bring their gradients together: as floats, or as packed signs
        (:mod:`fqt_jax.exchange`). The state must have been created with the same.

    Returns:
      ``step(state, batch, key) -> (state, loss)``. ``key`` is folded with ``state.step`` and seeds
      preprocessing and the estimator. ``loss`` is the batch's mean, still on the device. The state
      is donated: do not use it again.

    Raises:
      TypeError: ``estimator`` has no method ``gradients``.
      ValueError: a metric is called ``"loss"``, or ``statistics`` is neither. A step raises for a
        batch that the devices cannot share evenly; the first with a batch of a new shape for an
        empty batch, arrays of different lengths, a loss or metric that is not one number a sample,
        and metrics that the state does not sum.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> def square_error(outputs, batch):
      ...     return jnp.mean(jnp.square(outputs - batch["y"]), axis=-1)
      >>> optimizer = optax.sgd(0.5)
      >>> graphdef, state = create_state(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), optimizer)
      >>> step = make_train_step(graphdef, optimizer, loss=square_error)
      >>> batch = {"x": jnp.eye(3), "y": jnp.ones((3, 1))}
      >>> for _ in range(100):
      ...     state, loss = step(state, batch, jax.random.key(0))
      >>> bool(loss < 1e-6), int(state.step)
      (True, 100)
    """
    check_names(metrics)
    if isinstance(estimator, type) or not hasattr(estimator, "gradients"):
        raise TypeError(
            f"estimator must be an object with a method gradients, such as FullBatch(); got "
            f"{estimator!r}."
        )

    if statistics not in get_args(Statistics):
        raise ValueError(
            f"statistics must be {' or '.join(map(repr, get_args(Statistics)))}; got "
            f"{statistics!r}."
        )
    shard = Shard(None if mesh is None else axes_of(mesh), statistics)

    def losses_of(outputs: Any, batch: Any) -> jax.Array:
        return _losses(loss, outputs, batch, batch_size(batch))

    def step(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, jax.Array]:
        if isinstance(batch, Padded):
            raise ValueError("a training step takes whole batches: padding would be trained on.")
        batch_size(batch)
        key = shard.own(jax.random.fold_in(key, state.step))
        if preprocess is not None:
            batch = preprocess(batch, key)
        n = batch_size(batch)
        model = shard.model(SplitModel(graphdef, state.params, state.others, inputs))
        result = estimator.gradients(model, batch, losses_of, jax.random.fold_in(key, 1))
        grads, kept = result.grads, state.exchange
        if shard.axes is not None:
            grads, kept = exchange.reduce(grads, kept, state.step, shard.axes)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        losses = losses_of(result.outputs, batch)
        values = evaluate_metrics(metrics, result.outputs, batch, n)
        sums = shard.added(state.metrics, {"loss": losses, **values})
        others = shard.agreed(state.others, result.others)
        new = TrainState(params, others, opt_state, state.step + 1, sums, kept)
        return new, shard.mean(jnp.sum(losses) / n)

    return TrainStep(step, loss, mesh, None if mesh is None else _state_specs(mesh))


def make_eval_step(
    graphdef: Any,
    *,
    loss: Loss,
    metrics: Mapping[str, Metric] = NO_METRICS,
    inputs: Part = default_inputs,
    preprocess: Callable[[Any], Any] | None = None,
    mesh: Mesh | None = None,
) -> EvalStep:
    """Builds the evaluation step, in which batch statistics are fixed.

    Args:
      graphdef: static structure of the model.
      loss, metrics, inputs: as for :func:`make_train_step`.
      preprocess: ``batch -> batch``, run on the device inside the step.
      mesh: devices that share each batch out among them; ``None`` for one device.

    Returns:
      ``step(state, metrics, batch) -> metrics``: running sums, which begin with ``None`` or
      ``Metrics.zero(names)``. The sums that are passed are donated. A last, shorter batch may be
      filled up by :func:`pad_batch`, so that it needs no compilation of its own.

    Raises:
      ValueError: as :func:`make_train_step`.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from flax import nnx
      >>> graphdef, state = create_state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), optax.sgd(0.1))
      >>> loss = CrossEntropy(num_classes=2)
      >>> evaluate = make_eval_step(graphdef, loss=loss, metrics={"accuracy": loss.accuracy})
      >>> sums = evaluate(state, None, {"x": np.ones((4, 3)), "label": np.array([0, 1, 0, 1])})
      >>> last = {"x": np.ones((2, 3)), "label": np.array([0, 1])}
      >>> evaluate(state, sums, pad_batch(last, 4)).means()["accuracy"]
      0.5
    """
    names = check_names(metrics)
    shard = Shard(None if mesh is None else axes_of(mesh))

    def step(state: TrainState, sums: Metrics, padded: Padded) -> Metrics:
        batch_size(padded)
        batch, valid = padded
        if preprocess is not None:
            batch = preprocess(batch)
        n = batch_size(batch)
        model = merge_model(graphdef, state)
        model.eval()
        given = inputs(batch)
        outputs = model(*given) if isinstance(given, tuple) else model(given)
        values = evaluate_metrics(metrics, outputs, batch, n)
        return shard.added(sums, {"loss": _losses(loss, outputs, batch, n), **values}, valid)

    return EvalStep(step, loss, names, mesh, None if mesh is None else _state_specs(mesh))


def _state_specs(mesh: Mesh) -> TrainState:
    """How a state lies on a mesh: whole on each device, but for what each keeps for itself."""
    every: Any = whole(mesh).spec
    return TrainState(every, every, every, every, every, exchange=by_sample(mesh).spec)


def _losses(loss: Loss, outputs: Any, batch: Any, n: int) -> jax.Array:
    """The loss of each sample, in ``float32`` at least."""
    losses = check_per_sample("the loss", loss(outputs, batch), n)
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise TypeError(f"the loss must be floating-point; got {losses.dtype}.")
    return losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
