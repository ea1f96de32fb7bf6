"""Training and evaluation steps: pure, jitted, with donated buffers and no host synchronization.

A model is split once into its static structure and a :class:`TrainState`. Everything that a step
needs or changes is in the state, random streams and running sums of the metrics included, so that
a run can stop after any step and continue with the same numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fqt_jax.binarize import check_float

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
) -> Callable[[TrainState, Images, jax.Array, jax.Array, jax.Array], tuple[TrainState, jax.Array]]:
    """Builds the jitted training step.

    Args:
      graphdef: static structure of the model.
      optimizer: an Optax optimizer.
      smoothing: label smoothing.
      preprocess: ``(images, key) -> images``, run on the device inside the step: augmentation and
        normalization.

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
        x, y = jnp.take(images, indices, axis=0), jnp.take(labels, indices, axis=0)
        if preprocess is not None:
            x = preprocess(x, jax.random.fold_in(key, state.step))

        def objective(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Any]]:
            model = nnx.merge(graphdef, params, state.others, copy=True)
            model.train()
            logits = model(x)
            losses = cross_entropy(logits, y, smoothing=smoothing)
            others = nnx.split(model, nnx.Param, ...)[2]
            return jnp.mean(losses), (jnp.sum(losses), logits, others)

        grads, (loss, logits, others) = jax.grad(objective, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = _add(state.metrics, loss, logits, y, jnp.ones(y.shape, jnp.bool_))
        new = TrainState(params, others, opt_state, state.step + 1, metrics)
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


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer with a rate for the head and one for the rest.

    The defaults are those of arXiv 2408.14267, section 5: Adam with 1e-3 for the head and 1e-5 for
    the rest, or SGD of momentum 0.9 with 1e-3 and 1e-4; weight decay 1e-5, added to the gradient;
    cosine decay to zero.

    Args:
      name: ``"adam"``, ``"sgd"``, or any Optax optimizer that takes a learning rate.
      learning_rate: of all parameters but the head's; ``None`` for the default.
      head_learning_rate: of the parameters of the head; ``None`` for the default, or
        ``learning_rate`` if that is given.
      weight_decay: factor of the parameter that is added to its gradient.
      momentum: of SGD.
      schedule: ``"cosine"``, to zero over the run, or ``"constant"``.
      head: regular expression that matches the names of the head's parameters, such as
        ``head.kernel``.

    Raises:
      ValueError: an unknown name or schedule, or a number out of range.

    Example:
      >>> OptimizerConfig().rates()
      (1e-05, 0.001)
      >>> OptimizerConfig(learning_rate=1e-3).rates()
      (0.001, 0.001)
    """

    name: str = "adam"
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    weight_decay: float = 1e-5
    momentum: float = 0.9
    schedule: str = "cosine"
    head: str = r"head\..*"

    def __post_init__(self) -> None:
        known = self.name in ("adam", "sgd") or _takes_learning_rate(self.name)
        if not known:
            raise ValueError(
                f"unknown optimizer {self.name!r}; use 'adam', 'sgd' or the name of an Optax "
                "optimizer that takes a learning rate."
            )
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule must be 'cosine' or 'constant'; got {self.schedule!r}.")
        for field in ("learning_rate", "head_learning_rate"):
            rate = getattr(self, field)
            if rate is not None and not 0 <= rate < float("inf"):
                raise ValueError(f"{field} must be a number from 0 on; got {rate}.")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be a number from 0 on; got {self.weight_decay}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1); got {self.momentum}.")

    def rates(self) -> tuple[float, float]:
        """Learning rates of the rest and of the head, with the defaults filled in."""
        rest, head = (1e-4, 1e-3) if self.name == "sgd" else (1e-5, 1e-3)
        if self.learning_rate is not None:
            rest = head = self.learning_rate
        return rest, head if self.head_learning_rate is None else self.head_learning_rate

    def build(self, params: Any, total_steps: int) -> optax.GradientTransformation:
        """The Optax optimizer for ``params`` over ``total_steps`` steps.

        Raises:
          ValueError: no parameter's path matches ``head`` although its rate differs.
        """
        rest, head = self.rates()
        if rest == head:
            return self._transform(rest, total_steps)
        labels = jax.tree_util.tree_map_with_path(
            lambda path, _: "head" if re.fullmatch(self.head, leaf_name(path)) else "rest", params
        )
        if "head" not in jax.tree.leaves(labels):
            raise ValueError(f"no parameter's path matches the head's pattern {self.head!r}.")
        transforms = {
            "rest": self._transform(rest, total_steps),
            "head": self._transform(head, total_steps),
        }
        return optax.partition(transforms, labels)

    def _transform(self, rate: float, total_steps: int) -> optax.GradientTransformation:
        schedule: Any = rate
        if self.schedule == "cosine":
            schedule = optax.cosine_decay_schedule(rate, max(1, total_steps))
        if self.name == "sgd":
            optimizer = optax.sgd(schedule, momentum=self.momentum or None)
        else:
            optimizer = getattr(optax, self.name)(schedule)
        if self.weight_decay == 0:
            return optimizer
        return optax.chain(optax.add_decayed_weights(self.weight_decay), optimizer)


def _takes_learning_rate(name: str) -> bool:
    function = getattr(optax, name, None)
    if not inspect.isfunction(function) or name.startswith("_"):
        return False
    parameters = inspect.signature(function).parameters
    return next(iter(parameters), None) == "learning_rate"


def leaf_name(path: tuple[Any, ...]) -> str:
    """A pytree path as names joined by dots; the entry of an NNX variable's value left out.

    Example:
      >>> import jax
      >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({"head": {"bias": 1.0}})
      >>> leaf_name(path)
      'head.bias'
    """
    names = []
    for entry in path:
        for attribute in ("key", "idx", "name"):
            if hasattr(entry, attribute):
                names.append(str(getattr(entry, attribute)))
                break
    return ".".join(name for name in names if name != "value")
