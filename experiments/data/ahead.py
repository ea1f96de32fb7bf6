"""Makes the batches of a schedule before they are needed, by Grain, on threads or in processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory

import numpy as np

from experiments.data.dataset import import_extra
from experiments.data.schedule import Batch, Schedule
from experiments.process import SIGNALS

_MOST_THREADS = 16
"""Each has a batch in memory; beyond, Python's lock is what they wait for."""


@contextlib.contextmanager
def made_ahead(schedule: Schedule, first: int, workers: int) -> Iterator[Iterator[Batch]]:
    """The batches of a schedule from one on, made ahead of their use.

    In this context signals are blocked in this thread.

    Args:
      schedule: the batches.
      first: the number of the first one.
      workers: processes that make them; 0 for threads of this process, one for each processor.

    Yields:
      The batches. They are the same for any number of workers. No process is left when the context
      is, or when this process ends in whatever way.

    Raises:
      DataError: Grain is not installed; later, an image cannot be read.
      RuntimeError: later, a process ended that should not have.
    """
    grain = import_extra("grain", "experiments")
    with contextlib.ExitStack() as held:
        if workers:
            _quiet_tracker()
            held.enter_context(_signals_blocked())
            source = grain.MapDataset.source(held.enter_context(_handed_over(schedule)))[first:]
            flags = import_extra("absl.flags", "experiments").FLAGS
            if not flags.is_parsed():  # Grain reads flags of its own, and fails if nobody set them
                flags.mark_as_parsed()
            dataset = source.to_iter_dataset(grain.ReadOptions(1, 1)).mp_prefetch(
                grain.MultiprocessingOptions(workers, per_worker_buffer_size=1),
                worker_init_fn=_end_with_parent,
            )
        else:
            threads = min(os.cpu_count() or 1, _MOST_THREADS)
            source = grain.MapDataset.source(schedule)[first:]
            dataset = source.to_iter_dataset(grain.ReadOptions(threads, threads + 1))
        yield _copied(held.enter_context(contextlib.closing(iter(dataset))))


def _copied(iterator: Iterator[Batch]) -> Iterator[Batch]:
    """The batches out of the memory that processes share, which goes with the processes."""
    try:
        for batch in iterator:
            yield {name: np.array(array) for name, array in batch.items()}
            del batch
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise RuntimeError(
            "a process that reads images was killed, perhaps for lack of memory: try fewer workers."
        ) from error


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Threads and processes that are started here inherit that signals do not reach them.

    So Ctrl-C, which a terminal sends to all processes, is for the first one alone.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _HandedOver:
    """A schedule in shared memory, which each process copies out of it when it needs it.

    What a process is started with goes through a pipe and has to fit into it: a process that is
    still reading when this one ends would complain at length.
    """

    def __init__(self, name: str, length: int):
        self._name, self._length = name, length
        self._schedule: Schedule | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        if self._schedule is None:
            memory = SharedMemory(self._name)
            assert memory.buf is not None
            self._schedule = pickle.loads(memory.buf)
            memory.close()
        return self._schedule[index]


@contextlib.contextmanager
def _handed_over(schedule: Schedule) -> Iterator[_HandedOver]:
    content = pickle.dumps(schedule)
    memory = SharedMemory(create=True, size=len(content))
    assert memory.buf is not None
    try:
        memory.buf[: len(content)] = content
        yield _HandedOver(memory.name, len(schedule))
    finally:
        memory.close()
        memory.unlink()


def _end_with_parent(worker: int, workers: int) -> None:
    """Ends a worker with the process that started it, in whatever way that one ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _quiet_tracker() -> None:
    """Starts Python's process that cleans up after this one, and keeps it from printing.

    Where a signal ends this process at once, it would say what it had to clean up.
    """
    name = "PYTHONWARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "ignore"
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
