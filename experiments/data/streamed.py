"""Examples whose images stay where they are until a batch needs them."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from experiments.data.dataset import DataError, channel_statistics
from experiments.data.pictures import Pictures
from experiments.data.views import View, central, random_view, random_words

SAMPLED = 2000
"""Images that the statistics of a split are taken of."""


@dataclasses.dataclass(frozen=True, eq=False)
class Streamed:
    """Images that are decoded when they are needed, and their labels.

    Args:
      pictures: the images.
      indices: int64 ``[N]``: which of them, N at least 1.
      labels: int32 ``[N]``.
      size: height and width of what is decoded.

    Raises:
      DataError: there are none.

    Example:
      >>> from experiments.data.pictures import ArrayPictures
      >>> pictures = ArrayPictures(np.arange(5 * 64, dtype=np.uint8).reshape(5, 8, 8, 1))
      >>> examples = Streamed(pictures, np.array([4, 1]), np.array([0, 1], np.int32), (7, 7))
      >>> len(examples), examples.first(9).shape
      (2, (2, 7, 7, 1))
    """

    pictures: Pictures
    indices: np.ndarray
    labels: np.ndarray
    size: tuple[int, int]

    def __post_init__(self) -> None:
        if not len(self.indices):
            raise DataError("a split is empty.")

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        return *self.size, self.pictures.channels

    def first(self, count: int) -> np.ndarray:
        """The first images, at most ``count``, as in evaluation."""
        return self.pictures.decode(self.indices[:count], self.size, central)

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """:func:`channel_statistics` of the first ``SAMPLED`` images."""
        return channel_statistics(self.first(SAMPLED))

    def evaluated(self, positions: np.ndarray) -> np.ndarray:
        """The usual view in evaluation (:func:`experiments.data.views.central`)."""
        return self._views(positions, [central] * len(positions))

    def augmented(self, positions: np.ndarray, seed: int, epoch: int, *, flip: bool) -> np.ndarray:
        """A random view of each example (:func:`experiments.data.views.random_view`).

        It follows from the seed, the epoch and the example, whatever batch that is in.
        """
        views: list[View] = [
            functools.partial(random_view, words=random_words(seed, epoch, int(p)), flip=flip)
            for p in positions
        ]
        return self._views(positions, views)

    def _views(self, positions: np.ndarray, views: list[View]) -> np.ndarray:
        # One after the other: whole batches are what threads and processes share out.
        images = np.empty((len(positions), *self.shape), np.uint8)
        for image, position, view in zip(images, positions, views, strict=True):
            image[...] = self.pictures.view(int(self.indices[position]), self.size, view)
        return images
