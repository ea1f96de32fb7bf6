"""Which example goes into which split, decided by content and never by the order of a file."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np

from experiments.data.dataset import DataError, Dataset, Examples, Split
from experiments.data.pictures import Pictures
from experiments.data.streamed import Streamed

TEST_SEED = 0
"""Of the keys of test examples, whatever the run's seed: what is reported must not vary."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Examples whose images are decoded only once it is known which of them are wanted.

    Args:
      labels: int32 ``[N]``.
      keys: uint64 ``[N]``, see ``content_keys``.
      pictures: the images.
      size: height and width of what is decoded.
    """

    labels: np.ndarray
    keys: np.ndarray
    pictures: Pictures
    size: tuple[int, int]

    def take(self, indices: np.ndarray) -> Split:
        """Decodes the examples at ``indices``."""
        return Split(self.pictures.decode(indices, self.size), self.labels[indices])

    def stream(self, indices: np.ndarray) -> Streamed:
        """The examples at ``indices``, to be decoded when they are needed."""
        return Streamed(self.pictures, indices, self.labels[indices], self.size)


def content_key(content: bytes, seed: int) -> int:
    """A 64-bit hash of an example and a seed, the same on every machine and in every release.

    Example:
      >>> content_key(b"an image", seed=0) == content_key(b"an image", seed=0)
      True
      >>> content_key(b"an image", seed=0) == content_key(b"an image", seed=1)
      False
    """
    digest = hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little")


def content_keys(contents: Iterable[bytes], seed: int) -> np.ndarray:
    """``content_key`` of each example: uint64 ``[N]``."""
    return np.fromiter((content_key(content, seed) for content in contents), np.uint64)


def stratified_order(labels: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """An order in which every prefix holds the classes in their proportions.

    Of ``m`` examples, a class with share ``s`` of all gets ``s m``, give or take
    ``0.5 + s K / 2`` for ``K`` classes, which is one example where classes are equally frequent.
    One order serves every choice made here: a prefix is held out, the rest is trained on, and a
    prefix of the rest is what a limit leaves. Since it sorts by key, it does not depend on the
    order in which the examples are given.

    Args:
      labels: int ``[N]``.
      keys: uint64 ``[N]``: random numbers that belong to the examples.

    Returns:
      int64 ``[N]``: a permutation.

    Example:
      >>> labels = np.array([0, 0, 0, 0, 1, 1])
      >>> labels[stratified_order(labels, np.arange(6))]
      array([0, 1, 0, 0, 1, 0])
    """
    by_class = np.lexsort((keys, labels))
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, counts)
    position = np.empty(len(labels))
    position[by_class] = (rank + 0.5) / np.repeat(counts, counts)
    return np.lexsort((keys, position))


def assemble(
    name: str,
    num_classes: int,
    *,
    train: Source,
    test: Source,
    validation: Source | None,
    validation_fraction: float,
    limit: int | None,
    class_names: tuple[str, ...] = (),
    streams: bool = False,
) -> Dataset:
    """Splits, limits and only then decodes.

    Args:
      name: of the data set.
      num_classes: labels lie in ``[0, num_classes)``.
      train: training examples; validation data are held out of them where there are none.
      test: test examples.
      validation: the data set's own validation examples, or ``None``.
      validation_fraction: the part of ``train`` to hold out, stratified.
      limit: the most examples in a split, or ``None``. What is held out does not depend on it.
      class_names: of each label, where they are known.
      streams: whether images are decoded when they are needed, and not here.

    Raises:
      DataError: a split would be empty, or what is decoded is not a valid data set.
    """

    def examples(source: Source, indices: np.ndarray) -> Examples:
        chosen = indices[:limit]
        return source.stream(chosen) if streams else source.take(chosen)

    for field, source in (("train", train), ("validation", validation), ("test", test)):
        if source is not None and not len(source.labels):
            raise DataError(f"{name}: the {field} split is empty.")
    order = stratified_order(train.labels, train.keys)
    if validation is None:
        held_out = round(validation_fraction * len(order))
        if not 0 < held_out < len(order):
            raise DataError(
                f"{name}: validation_fraction={validation_fraction} of {len(order)} images leaves "
                f"{held_out} for validation and {len(order) - held_out} for training."
            )
        held = examples(train, order[:held_out])
        order = order[held_out:]
    else:
        held = examples(validation, stratified_order(validation.labels, validation.keys))
    return Dataset(
        name=name,
        train=examples(train, order),
        validation=held,
        test=examples(test, stratified_order(test.labels, test.keys)),
        num_classes=num_classes,
        class_names=class_names,
    )
