"""Steps as they are called: what can be checked is checked on the host, then one program runs."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fqt_jax.batches import Padded, batch_size, take
from fqt_jax.losses import Loss
from fqt_jax.mesh import by_sample, check_shares
from fqt_jax.metrics import Metrics

_IN_FLIGHT = 4
"""Steps that may be under way on several devices of one CPU."""


class TrainStep:
    """``step(state, batch, key) -> (state, loss)``; see :func:`fqt_jax.training.make_train_step`.

    Attributes:
      function: the step as a pure function.
      jitted: the same under :func:`jax.jit`, with the state donated and nothing checked.
      loss: the loss.
      mesh: the devices that share a batch, or ``None``.
      places: where state, batch and key lie on a mesh, or ``None``.

    Args:
      function: the step; on a mesh, one device's part of it.
      loss: the loss.
      mesh: the devices that share a batch.
      state: how a state lies on them, as the specifications of :func:`jax.shard_map`.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Any, jax.Array]],
        loss: Loss,
        mesh: Mesh | None = None,
        state: Any = None,
    ):
        self.function, self.loss, self.mesh = function, loss, mesh
        self.places: tuple[Any, ...] | None = None
        if mesh is not None:
            specs = state, by_sample(mesh).spec, PartitionSpec()
            self.function = _shared_out(function, mesh, specs, (state, PartitionSpec()))
            self.places = _shardings(mesh, specs)
        self.jitted: Any = _jitted(self.function, 0, self.places)
        self._ahead = _Ahead(mesh)

    def __call__(self, state: Any, batch: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        """One step on a batch, which may be on the host or on the device."""
        _check(self.loss, batch, wait=False)
        if self.mesh is not None:
            check_shares(batch_size(batch), self.mesh)
        new, loss = self.jitted(state, batch, key)
        self._ahead.add(loss)
        return new, loss


class EvalStep:
    """``step(state, sums, batch) -> sums``; see :func:`fqt_jax.training.make_eval_step`.

    Attributes:
      function: the step as a pure function of ``(state, sums, padded batch)``.
      jitted: the same under :func:`jax.jit`, with the sums donated and nothing checked.
      loss: the loss.
      names: of the metrics.
      mesh: the devices that share a batch, or ``None``.
      places: where state, sums and batch lie on a mesh, or ``None``.

    Args:
      function: the step; on a mesh, one device's part of it.
      loss, names: the loss, and the names of the metrics.
      mesh, state: as for :class:`TrainStep`.
    """

    def __init__(
        self,
        function: Callable[..., Metrics],
        loss: Loss,
        names: tuple[str, ...],
        mesh: Mesh | None = None,
        state: Any = None,
    ):
        self.function, self.loss, self.names, self.mesh = function, loss, names, mesh
        self.places: tuple[Any, ...] | None = None
        if mesh is not None:
            specs = state, PartitionSpec(), by_sample(mesh).spec
            self.function = _shared_out(function, mesh, specs, PartitionSpec())
            self.places = _shardings(mesh, specs)
        self.jitted: Any = _jitted(self.function, 1, self.places)
        self._ahead = _Ahead(mesh)

    def __call__(self, state: Any, sums: Metrics | None, batch: Any) -> Metrics:
        """The sums with those of a batch added, or these alone where there are ``None`` yet."""
        if not isinstance(batch, Padded):
            # All batches have a mask, so that one program serves whole ones and padded ones.
            batch = Padded(batch, np.ones(batch_size(batch), np.bool_))
        _check(self.loss, batch.batch, wait=False)
        if self.mesh is not None:
            check_shares(batch_size(batch), self.mesh)
        new: Metrics = self.jitted(state, _begun(sums, self.names), batch)
        self._ahead.add(new)
        return new


class GatheredTrainStep:
    """``step(state, data, indices, key) -> (state, loss)``; see :func:`gather_on_device`."""

    def __init__(self, step: TrainStep):
        def function(state: Any, data: Any, indices: jax.Array, key: jax.Array) -> Any:
            return step.function(state, take(data, indices), key)

        self._data, self._mesh = _DeviceData(step.loss), step.mesh
        places = step.places
        if places is not None:
            state, batch, key = places
            places = state, key, batch, key  # the data are whole on each device, as keys are
        self.jitted: Any = _jitted(function, 0, places)
        self._ahead = _Ahead(step.mesh)

    def __call__(
        self, state: Any, data: Any, indices: Any, key: jax.Array
    ) -> tuple[Any, jax.Array]:
        """One step on the samples at ``indices``, ``int32[N]``."""
        size = self._data.checked_size(data)
        _check_indices(indices, size, self._mesh, lowest=0)
        new, loss = self.jitted(state, data, indices, key)
        self._ahead.add(loss)
        return new, loss


class GatheredEvalStep:
    """``step(state, sums, data, indices) -> sums``; see :func:`gather_on_device`."""

    def __init__(self, step: EvalStep):
        def function(state: Any, sums: Metrics, data: Any, indices: jax.Array) -> Metrics:
            batch = take(data, jnp.maximum(indices, 0))
            return step.function(state, sums, Padded(batch, indices >= 0))

        self._data, self._names, self._mesh = _DeviceData(step.loss), step.names, step.mesh
        places = step.places
        if places is not None:
            state, sums, batch = places
            places = state, sums, sums, batch  # the data are whole on each device, as sums are
        self.jitted: Any = _jitted(function, 1, places)
        self._ahead = _Ahead(step.mesh)

    def __call__(self, state: Any, sums: Metrics | None, data: Any, indices: Any) -> Metrics:
        """Adds the samples at ``indices``, ``int32[N]``; those at -1 count for nothing."""
        size = self._data.checked_size(data)
        _check_indices(indices, size, self._mesh, lowest=-1)
        new: Metrics = self.jitted(state, _begun(sums, self._names), data, indices)
        self._ahead.add(new)
        return new


@overload
def gather_on_device(step: TrainStep) -> GatheredTrainStep: ...
@overload
def gather_on_device(step: EvalStep) -> GatheredEvalStep: ...
def gather_on_device(step: TrainStep | EvalStep) -> GatheredTrainStep | GatheredEvalStep:
    """A step that takes its batches from a data set on the device, so that no data cross to it.

    Gathering and the step are one program. ``data`` is a batch of the whole data set, and
    ``indices``, ``int32[N]`` on the host or the device, say which samples of it to take:

    - ``step(state, data, indices, key) -> (state, loss)`` for training;
    - ``step(state, sums, data, indices) -> sums`` for evaluation, where indices of -1 fill up a
      shorter batch and count for nothing.

    A data set is checked once, when it is first seen, which waits for it: its arrays, and by the
    loss its values. Indices are checked where they are on the host.

    Args:
      step: from :func:`fqt_jax.training.make_train_step` or
        :func:`fqt_jax.training.make_eval_step`.

    Raises:
      TypeError: ``step`` is neither; later, data that are on the host or indices that are not
        whole numbers.
      ValueError: later, data that are no batch or that the loss refuses, or indices out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> optimizer = optax.sgd(0.1)
      >>> graphdef, state = fqt.training.create_state(
      ...     nnx.Linear(3, 3, rngs=nnx.Rngs(0)), optimizer)
      >>> loss = fqt.training.CrossEntropy(num_classes=3)
      >>> step = gather_on_device(fqt.training.make_train_step(graphdef, optimizer, loss=loss))
      >>> data = (jnp.eye(3), jnp.arange(3))
      >>> state, mean = step(state, data, np.array([0, 2]), jax.random.key(0))
      >>> step(state, (jnp.eye(3), jnp.arange(3) + 1), np.array([0, 2]), jax.random.key(0))
      Traceback (most recent call last):
        ...
      ValueError: labels must lie in 0..2 for 3 classes; the batch has labels from 1 to 3.
    """
    if isinstance(step, TrainStep):
        return GatheredTrainStep(step)
    if isinstance(step, EvalStep):
        return GatheredEvalStep(step)
    raise TypeError(
        f"step must come from make_train_step or make_eval_step; got {type(step).__name__}."
    )


class _DeviceData:
    """Checks a data set once. It is known again by its arrays, which cannot change."""

    def __init__(self, loss: Loss):
        self._loss = loss
        self._seen: list[weakref.ref[jax.Array]] = []
        self._size = 0

    def checked_size(self, data: Any) -> int:
        leaves = jax.tree.leaves(data)
        seen = len(leaves) == len(self._seen) and all(
            ref() is leaf for ref, leaf in zip(self._seen, leaves, strict=True)
        )
        if not seen:
            for leaf in leaves:
                if not isinstance(leaf, jax.Array):
                    raise TypeError(
                        "the data set must be on the device: put it there once, by "
                        f"jax.device_put(data); got {type(leaf).__name__}."
                    )
            self._size = batch_size(data)
            _check(self._loss, data, wait=True)
            self._seen = [weakref.ref(leaf) for leaf in leaves]
        return self._size


class _Ahead:
    """Keeps steps from running far ahead of several devices of one CPU.

    XLA lets some tens of programs wait for such a device, and then one device waits for its turn
    while the others wait for it, in a collective operation of an earlier step: a deadlock, seen
    with jax 0.10.1 and its own kernels alone.
    """

    def __init__(self, mesh: Mesh | None):
        local = [] if mesh is None else mesh.local_devices
        self._limits = len(local) > 1 and local[0].platform == "cpu"
        self._results: collections.deque[Any] = collections.deque()

    def add(self, result: Any) -> None:
        """Takes what a step gave, and waits for that of some steps before."""
        if self._limits:
            # A copy: what a step gives may be given to the next one, and be gone.
            self._results.append(jax.tree.map(jnp.copy, result))
            if len(self._results) > _IN_FLIGHT:
                jax.block_until_ready(self._results.popleft())


def _shared_out(
    function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """A step of which each device of a mesh does its part."""
    # What a step gives is the same on all devices by what it does; the types of values need not
    # tell, which those of a loop in somebody's model would not.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _shardings(mesh: Mesh, specs: tuple[Any, ...]) -> tuple[Any, ...]:
    def is_spec(spec: Any) -> bool:
        return isinstance(spec, PartitionSpec)

    places: tuple[Any, ...] = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec
    )
    return places


def _jitted(function: Callable[..., Any], donated: int, places: tuple[Any, ...] | None) -> Any:
    if places is None:
        return jax.jit(function, donate_argnums=donated)
    return jax.jit(function, donate_argnums=donated, in_shardings=places)


def _check(loss: Loss, batch: Any, *, wait: bool) -> None:
    check = getattr(loss, "check", None)
    if check is not None:
        check(batch, wait)


def _check_indices(indices: Any, size: int, mesh: Mesh | None, *, lowest: int) -> None:
    if not isinstance(indices, jax.Array | np.ndarray):
        raise TypeError(f"indices must be an array; got {type(indices).__name__}.")
    if not jnp.issubdtype(indices.dtype, jnp.integer) or indices.ndim != 1:
        raise TypeError(
            f"indices must be whole numbers with one axis; got {indices.dtype}"
            f"{list(indices.shape)}."
        )
    if mesh is not None:
        check_shares(len(indices), mesh)
    if isinstance(indices, jax.Array) or not indices.size:
        return  # on the device, or an empty batch, which the step refuses
    least, most = int(indices.min()), int(indices.max())
    if least < lowest or most >= size:
        raise ValueError(
            f"indices must lie in {lowest}..{size - 1} for {size} samples; got {least} to {most}."
        )


def _begun(sums: Metrics | None, names: tuple[str, ...]) -> Metrics:
    return Metrics.zero(names) if sums is None else sums
