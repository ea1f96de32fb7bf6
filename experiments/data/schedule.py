"""All batches of a run, in the order in which it needs them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np

from experiments.data.batches import epoch_order
from experiments.data.dataset import DataError
from experiments.data.streamed import Streamed

Part = Literal["train", "validation", "test"]
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The batches of a run by number: each epoch's, validation after it, and the test at the end.

    A batch follows from its number and the fields alone, so that it makes no difference who makes
    it, and a run goes on from any number as if it had not stopped.

    Args:
      train, validation, test: the examples.
      batch_size: of each batch. In validation and test the last one is filled up.
      epochs: how many there are.
      seed: of order and views.
      flip: whether training images are mirrored at random.
      stratify: whether a batch is laid out by label (:func:`epoch_order`).
      test_each_epoch: whether the test follows after each epoch too.
      share, shares: which of how many equal pieces of each batch is made.
      devices: that share each batch (``pieces`` of :func:`epoch_order`).

    Raises:
      DataError: there are fewer training examples than one batch, or it has no equal pieces.

    Example:
      >>> from experiments.data import load
      >>> data = load("digits", limit=100, stream="yes")
      >>> schedule = Schedule(data.train, data.validation, data.test, batch_size=32, epochs=2)
      >>> len(schedule), schedule.start("train", 1), schedule.start("test", 2)
      (18, 7, 14)
      >>> schedule[0]["image"].shape, schedule[6]["valid"].sum()
      ((32, 16, 16, 1), np.int64(4))
    """

    train: Streamed
    validation: Streamed
    test: Streamed
    batch_size: int
    epochs: int
    seed: int = 0
    flip: bool = True
    stratify: bool = False
    test_each_epoch: bool = False
    share: int = 0
    shares: int = 1
    devices: int = 1

    def __post_init__(self) -> None:
        if self.batch_size > len(self.train):
            raise DataError(f"there are only {len(self.train)} training images.")
        if self.batch_size % self.shares:
            raise DataError(
                f"a batch of {self.batch_size} images has no {self.shares} equal pieces."
            )

    def batches(self, part: Part) -> int:
        """How many batches a part has."""
        if part == "train":
            return len(self.train) // self.batch_size
        return -(-len(getattr(self, part)) // self.batch_size)

    def _parts(self, epoch: int) -> list[Part]:
        if epoch == self.epochs:
            return ["test"]
        parts: list[Part] = ["train", "validation"]
        return [*parts, "test"] if self.test_each_epoch else parts

    @property
    def _per_epoch(self) -> int:
        return sum(map(self.batches, self._parts(0)))

    def start(self, part: Part, epoch: int) -> int:
        """The number of a part's first batch; the test at the end is in the epoch after the last.

        Raises:
          ValueError: there is no such part then.
        """
        parts = self._parts(epoch)
        before = parts[: parts.index(part)]
        return epoch * self._per_epoch + sum(map(self.batches, before))

    def __len__(self) -> int:
        return self.epochs * self._per_epoch + self.batches("test")

    def __getitem__(self, index: int) -> Batch:
        """A batch, or the share of it.

        It has ``"image"``, uint8 ``[B, H, W, C]``, and ``"label"``, int32 ``[B]``.

        In validation and test there is also ``"valid"``, bool ``[B]``, false where an example only
        fills up the batch.

        Raises:
          DataError: an image cannot be read; it is named.
        """
        epoch, step = divmod(int(index), self._per_epoch)
        for part in self._parts(epoch):
            if step < self.batches(part):
                break
            step -= self.batches(part)
        count = self.batch_size // self.shares
        mine = np.arange(count) + self.share * count
        if part == "train":
            chosen = _order(self, epoch)[step][mine]
            images = self.train.augmented(chosen, self.seed, epoch, flip=self.flip)
            return {"image": images, "label": self.train.labels[chosen]}
        examples: Streamed = getattr(self, part)
        places = mine + step * self.batch_size
        valid = places < len(examples)
        kept = places[valid]
        fill = [(0, count - len(kept))]
        return {
            "image": np.pad(examples.evaluated(kept), fill + [(0, 0)] * 3),
            "label": np.pad(examples.labels[kept], fill),
            "valid": valid,
        }


@functools.lru_cache(maxsize=2)  # an epoch's, and the next one's for whoever is ahead
def _order(schedule: Schedule, epoch: int) -> np.ndarray:
    labels = schedule.train.labels if schedule.stratify else None
    n = len(schedule.train)
    size, seed, pieces = schedule.batch_size, schedule.seed, schedule.devices
    return epoch_order(n, size, seed, epoch, labels=labels, pieces=pieces)
