"""Images of a data set before they are decoded: opened one at a time, by any thread or process."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image

from experiments.data.images import parallel_map
from experiments.data.views import View, whole

R = TypeVar("R")


class Pictures(abc.ABC):
    """Images by number. They can be pickled, so that other processes open them too.

    Attributes:
      channels: 1 or 3; files of any mode become RGB.
    """

    channels: int = 3

    @abc.abstractmethod
    def see(self, index: int, view: Callable[[Image.Image], R]) -> R:
        """Opens an image and applies a function to it.

        Raises:
          DataError: it cannot be read; the message says which one it is.
        """

    def view(self, index: int, size: tuple[int, int], view: View) -> np.ndarray:
        """What a view makes of an image, ``uint8[H, W, C]``."""
        return self.see(index, lambda file: view(file, size))[..., : self.channels]

    def decode(self, indices: np.ndarray, size: tuple[int, int], view: View = whole) -> np.ndarray:
        """A view of each image, on threads: ``uint8[n, H, W, C]``."""
        images = np.empty((len(indices), *size, self.channels), np.uint8)

        def fill(position: int) -> None:
            images[position] = self.view(int(indices[position]), size, view)

        parallel_map(fill, range(len(indices)))
        return images


class ArrayPictures(Pictures):
    """Images in memory.

    Args:
      images: uint8 ``[N, H, W, C]`` with 1 or 3 channels.

    Example:
      >>> images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
      >>> ArrayPictures(images).decode(np.array([2]), (2, 2))[0, ..., 0]
      array([[ 8,  9],
             [10, 11]], dtype=uint8)
    """

    def __init__(self, images: np.ndarray):
        self._images = images
        self.channels = images.shape[3]

    def see(self, index: int, view: Callable[[Image.Image], R]) -> R:
        image = self._images[index]
        return view(Image.fromarray(image[..., 0] if self.channels == 1 else image))

    def decode(self, indices: np.ndarray, size: tuple[int, int], view: View = whole) -> np.ndarray:
        if view is whole and self._images.shape[1:3] == size:
            return self._images[indices]
        return super().decode(indices, size, view)
