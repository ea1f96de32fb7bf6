"""Where the steps of a run get their batches: from the device, or from a stream of images."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.data import Dataset, Examples, Streamed, epoch_order
from experiments.data.ahead import made_ahead
from experiments.data.schedule import Part, Schedule
from experiments.runs.config import RunConfig
from experiments.runs.devices import placed, shared, shared_indices
from experiments.runs.kinds import Data, flips, kind_of
from fqt_jax.batches import Padded


class Batches(Protocol):
    """The batches of a run: each is what a step takes between state and key."""

    def train(self, epoch: int, first: int) -> Iterator[tuple[Any, ...]]:
        """Those of an epoch from one on. The same whenever they are asked for."""

    def evaluate(self, part: Part, epoch: int) -> Iterator[tuple[Any, ...]]:
        """Those of a part after an epoch; the test at the end is in the epoch after the last."""

    def ready(self) -> bool:
        """Whether the next one can be had without waiting."""

    def close(self) -> None:
        """Ends what makes them."""


def batches(config: RunConfig, dataset: Dataset, mesh: Mesh | None = None) -> Batches:
    """The batches of a run, as its data set is held on the device or streamed.

    On several devices they share each batch. Of several processes each makes its share of a
    stream alone.
    """
    parts = (dataset.train, dataset.validation, dataset.test)
    train, validation, test = parts
    if not isinstance(train, Streamed):
        return Held(config, dataset, mesh)
    assert isinstance(validation, Streamed)
    assert isinstance(test, Streamed)
    schedule = Schedule(
        train,
        validation,
        test,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        flip=flips(config, dataset),
        stratify=config.stratify,
        test_each_epoch=config.test_each_epoch,
        share=jax.process_index(),
        shares=jax.process_count(),
        devices=1 if mesh is None else mesh.size,
    )
    return Stream(schedule, config.workers or 0, mesh)


def on_device(dataset: Dataset, examples: Examples, mesh: Mesh | None = None) -> Data:
    """A split of a data set as the gathering steps take it, whole on each device."""
    arrays = {kind_of(dataset).inputs: examples.first(len(examples)), "label": examples.labels}
    held: Data = placed(arrays, mesh) if mesh is not None else jax.tree.map(jnp.asarray, arrays)
    return held


def gathered(data: Data, batch_size: int, mesh: Mesh | None = None) -> Iterator[tuple[Data, Any]]:
    """Data and indices for an evaluation in batches of one size; -1 fills up the last one."""
    n = len(data["label"])
    for start in range(0, n, batch_size):
        indices = np.arange(start, start + batch_size, dtype=np.int32)
        yield data, shared_indices(np.where(indices < n, indices, np.int32(-1)), mesh)


class Held:
    """Batches of a data set that lies on the device: the whole of it, and which of it to take."""

    def __init__(self, config: RunConfig, dataset: Dataset, mesh: Mesh | None = None):
        self._config, self._dataset, self._mesh = config, dataset, mesh
        self._train = on_device(dataset, dataset.train, mesh)
        self._validation = on_device(dataset, dataset.validation, mesh)

    def train(self, epoch: int, first: int) -> Iterator[tuple[Any, ...]]:
        config, labels = self._config, self._dataset.train.labels
        by = labels if config.stratify else None
        pieces = 1 if self._mesh is None else self._mesh.size
        order = epoch_order(
            len(labels), config.batch_size, config.seed, epoch, labels=by, pieces=pieces
        )
        return ((self._train, shared_indices(indices, self._mesh)) for indices in order[first:])

    def evaluate(self, part: Part, epoch: int) -> Iterator[tuple[Any, ...]]:
        dataset, mesh = self._dataset, self._mesh
        data = self._validation if part == "validation" else on_device(dataset, dataset.test, mesh)
        return gathered(data, self._config.batch_size, mesh)

    def ready(self) -> bool:
        return True

    def close(self) -> None:
        """There is nothing to end."""


class Stream:
    """Batches of a schedule, each on the device before the step before it is over.

    Args:
      schedule: the batches.
      workers: of :func:`experiments.data.ahead.made_ahead`.
      mesh: the devices, where there are several.
    """

    def __init__(self, schedule: Schedule, workers: int, mesh: Mesh | None = None):
        self._schedule, self._workers, self._mesh = schedule, workers, mesh
        self._next = -1
        self._ahead: _Ahead | None = None

    def train(self, epoch: int, first: int) -> Iterator[tuple[Any, ...]]:
        start = self._schedule.start("train", epoch)
        count = self._schedule.batches("train")
        return ((batch,) for batch in self._from(start + first, count - first))

    def evaluate(self, part: Part, epoch: int) -> Iterator[tuple[Any, ...]]:
        for batch in self._from(self._schedule.start(part, epoch), self._schedule.batches(part)):
            valid = batch.pop("valid")
            yield (Padded(batch, valid),)

    def _from(self, start: int, count: int) -> Iterator[Any]:
        if start != self._next or self._ahead is None:
            self.close()
            self._ahead = _Ahead(self._schedule, start, self._workers, self._mesh)
            self._next = start
        for batch in itertools.islice(self._ahead, count):
            self._next += 1
            yield batch

    def ready(self) -> bool:
        return self._ahead is not None and self._ahead.ready()

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


class _Ahead:
    """A thread that puts the next batch on the device while a step runs."""

    def __init__(self, schedule: Schedule, first: int, workers: int, mesh: Mesh | None):
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._closed, self._mesh = threading.Event(), mesh
        arguments = (schedule, first, workers)
        self._thread = threading.Thread(target=self._fill, args=arguments, daemon=True)
        self._thread.start()

    def _fill(self, schedule: Schedule, first: int, workers: int) -> None:
        try:
            with made_ahead(schedule, first, workers) as made:
                for batch in made:
                    if not self._put(shared(batch, self._mesh)):
                        return
            self._put(None)
        except Exception as error:
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def ready(self) -> bool:
        return not self._queue.empty()

    def __iter__(self) -> Iterator[Any]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
