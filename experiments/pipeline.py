"""How many images a second are read, decoded and augmented, by threads or by processes.

    python -m experiments.pipeline --dataset folder --data-dir photos --workers 0 2 4

That is the pipeline of a run with --stream alone, without a model: a step that takes more images
a second than this waits for them. A run says itself how much of its time that was.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import time

from experiments import cli
from experiments.data import Streamed, load
from experiments.data.ahead import made_ahead
from experiments.data.schedule import Schedule
from experiments.show.formats import Table, show


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """What is read."""

    dataset: str
    """Data set, as for experiments.finetune."""
    data_dir: pathlib.Path | None = None
    """Where it is, as for experiments.finetune."""
    image_size: int | None = None
    """Images are cropped and resized to this; the default is the data set's."""
    batch_size: int = 128
    """Images in a batch."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Numbers of processes to compare; 0: threads of one process."""
    images: int = 4096
    """Images to read for each."""

    def __post_init__(self) -> None:
        for name, lowest in (("batch_size", 1), ("image_size", 1)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise cli.UserError(f"{name} must be at least {lowest}; got {value}.")
        if min(self.workers, default=-1) < 0:
            raise cli.UserError("workers must be numbers from 0 on.")
        if self.images < 2 * self.batch_size:
            raise cli.UserError(f"images must be at least two batches; got {self.images}.")


def main(config: PipelineConfig) -> None:
    """Runs the measurement."""
    size, directory = config.image_size, config.data_dir
    data = load(config.dataset, image_size=size, data_dir=directory, stream="yes")
    parts = (data.train, data.validation, data.test)
    train, validation, test = (part for part in parts if isinstance(part, Streamed))
    if config.batch_size > len(train):
        raise cli.UserError(f"batch_size is {config.batch_size} for {len(train)} training images.")
    epochs = -(-config.images // (len(train) // config.batch_size * config.batch_size))
    schedule = Schedule(train, validation, test, batch_size=config.batch_size, epochs=epochs)
    rows = []
    for workers in config.workers:
        began = time.perf_counter()
        count = config.images // config.batch_size
        with made_ahead(schedule, 0, workers) as batches:
            next(batches)
            first = time.perf_counter()
            for _ in itertools.islice(batches, count - 1):
                pass
            seconds = time.perf_counter() - first
        rate = (count - 1) * config.batch_size / seconds
        rows.append([str(workers or "threads"), f"{rate:.0f}", f"{first - began:.1f}"])
    title = f"{data.name}, {data.image_size[0]} x {data.image_size[1]}"
    show([Table(title, ["workers", "images/s", "seconds to the first batch"], rows)])


if __name__ == "__main__":
    cli.run(main, PipelineConfig)
