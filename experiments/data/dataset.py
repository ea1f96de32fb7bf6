"""What a data set is once it is loaded: checked splits, and nothing that reads files."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Protocol, runtime_checkable

import numpy as np


class DataError(ValueError):
    """The data, or a request for data, are not what they should be. The message is one line."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Imports an optional dependency.

    Raises:
      DataError: it cannot be imported; the message names the extra that installs it.

    Example:
      >>> import_extra("no_such_module", "tfds")
      Traceback (most recent call last):
        ...
      experiments.data.dataset.DataError: No module named 'no_such_module': install it with
        pip install 'fqt-jax[tfds]'.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise DataError(f"{reason}: install it with pip install 'fqt-jax[{extra}]'.") from error


class Examples(Protocol):
    """Images or texts and their labels, wherever they are."""

    @property
    def labels(self) -> np.ndarray:
        """``int32[N]``, or of text ``int32[N, T]``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Height, width and channels of every image, or the number of tokens in every sequence."""

    def __len__(self) -> int: ...

    def first(self, count: int) -> np.ndarray:
        """The first examples, at most ``count``, as in evaluation: ``uint8[n, H, W, C]``.

        They are a fair sample: the order has nothing to do with that of the files, and the first
        ones hold the classes in their proportions. Of text, ``uint8[n, T]``.
        """


@runtime_checkable
class Measured(Protocol):
    """Images whose channels have statistics."""

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """:func:`channel_statistics` of the images."""


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images in memory and their labels.

    Args:
      images: uint8 ``[N, H, W, C]``, N at least 1.
      labels: int32 ``[N]``.

    Raises:
      DataError: another type or rank, no images, or not one label per image.

    Example:
      >>> split = Split(np.zeros((5, 8, 8, 1), np.uint8), np.arange(5, dtype=np.int32))
      >>> len(split)
      5
      >>> Split(split.images, split.labels[:4])
      Traceback (most recent call last):
        ...
      experiments.data.dataset.DataError: 5 images but 4 labels.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        for field, dtype, rank in (("images", np.uint8, 4), ("labels", np.int32, 1)):
            value = getattr(self, field)
            if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != rank:
                got = f"{getattr(value, 'dtype', type(value).__name__)}{list(np.shape(value))}"
                raise DataError(f"{field} must be {np.dtype(dtype)} with {rank} axes; got {got}.")
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images but {len(self.labels)} labels.")
        if self.images.size == 0:
            raise DataError(f"a split is empty: its images are {list(self.images.shape)}.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def first(self, count: int) -> np.ndarray:
        """The first images, at most ``count``."""
        return self.images[:count]

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """:func:`channel_statistics` of all images."""
        return channel_statistics(self.images)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits of one data set.

    Args:
      name: what it was loaded as.
      train: what parameters are fitted on.
      validation: what choices are made on.
      test: what is reported, and chosen by nobody.
      num_classes: labels lie in ``[0, num_classes)``.
      class_names: of each label, where the data set has them.
      normalization: mean and deviation in place of those of the training split.

    Raises:
      DataError: a label is out of range, or the splits' images differ in shape.

    Example:
      >>> split = Split(np.full((4, 2, 2, 1), 7, np.uint8), np.array([0, 1, 2, 1], np.int32))
      >>> data = Dataset("toy", split, split, split, num_classes=3)
      >>> data.image_size, data.channels, data.mean
      ((2, 2), 1, array([7.], dtype=float32))
      >>> Dataset("toy", split, split, split, num_classes=2)
      Traceback (most recent call last):
        ...
      experiments.data.dataset.DataError: toy: the train split has label 2; labels must lie in
        [0, 2).
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples
    num_classes: int
    class_names: tuple[str, ...] = ()
    normalization: tuple[np.ndarray, np.ndarray] | None = None

    def __post_init__(self) -> None:
        for field in ("train", "validation", "test"):
            split = getattr(self, field)
            wrong = split.labels[(split.labels < 0) | (split.labels >= self.num_classes)]
            if wrong.size:
                raise DataError(
                    f"{self.name}: the {field} split has label {wrong[0]}; "
                    f"labels must lie in [0, {self.num_classes})."
                )
            if split.shape != self.train.shape:
                raise DataError(
                    f"{self.name}: {field} images are {list(split.shape)} "
                    f"but train images {list(self.train.shape)}."
                )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of every image."""
        height, width, _ = self.train.shape
        return height, width

    @property
    def channels(self) -> int:
        """Channels of every image: 1 or 3."""
        return self.train.shape[2]

    def normalized(self, mean: Sequence[float], std: Sequence[float]) -> Dataset:
        """The same images, normalized by other statistics: of each channel, on the scale 0 to 1."""
        return dataclasses.replace(
            self,
            normalization=(np.array(mean, np.float32) * 255, np.array(std, np.float32) * 255),
        )

    @functools.cached_property
    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        if self.normalization:
            return self.normalization
        assert isinstance(self.train, Measured)
        return self.train.statistics()

    @property
    def mean(self) -> np.ndarray:
        """Mean of each channel: float32 ``[C]``, on the scale 0 to 255."""
        return self._statistics[0]

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of each channel, as ``mean``; 1 for a constant channel."""
        return self._statistics[1]


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel.

    Grey levels are counted, so that the sums are exact integers and the rest is in float64.

    Args:
      images: uint8 ``[N, H, W, C]``.

    Returns:
      float32 ``[C]`` twice, on the scale 0 to 255. A constant channel gets deviation 1, so that
      normalizing it gives zeros.

    Example:
      >>> channel_statistics(np.array([0, 2, 5, 5], np.uint8).reshape(2, 1, 1, 2))
      (array([2.5, 3.5], dtype=float32), array([2.5, 1.5], dtype=float32))
    """
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), 64):  # in pieces: bincount widens what it is given
        for channel, histogram in enumerate(counts):
            piece = images[start : start + 64, ..., channel]
            histogram += np.bincount(piece.ravel(), minlength=256)
    levels = np.arange(256)
    pixels = images.size // images.shape[-1]
    mean = counts @ levels / pixels
    variance = (counts * np.square(levels - mean[:, None])).sum(1) / pixels
    std = np.where(np.count_nonzero(counts, axis=1) == 1, 1.0, np.sqrt(variance))
    return mean.astype(np.float32), std.astype(np.float32)
