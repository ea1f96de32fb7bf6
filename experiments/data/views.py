"""What is seen of an image of any size: all of it, its middle, or a part drawn at random."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from experiments.data.images import resize, to_rgb

MARGIN = 256 / 224
"""The shorter side in evaluation, over the side of the square that is cut out of its middle."""

_SCALE = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_TRIES = 10
_WORDS = 4 * _TRIES + 1


class View(Protocol):
    """Makes an image of one size of a Pillow image, which need not be loaded yet."""

    def __call__(self, file: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """Gives ``uint8[H, W, 3]`` for the size ``(H, W)``."""


def whole(file: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """All of an image but what a shape of another ratio leaves out at two sides."""
    return resize(to_rgb(file), size)


def central(file: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The usual view in evaluation: the shorter side scaled to 256, and the central 224 cut out.

    For other sizes than 224 the 256 is in proportion. A size that is not square is cut out of what
    covers it.

    Example:
      >>> central(Image.new("L", (500, 375), 7), (224, 224)).shape
      (224, 224, 3)
    """
    image = to_rgb(file)
    height, width = size
    if width * image.height >= height * image.width:  # as torchvision rounds
        wide = round(MARGIN * width)
        high = int(wide * image.height / image.width)
    else:
        high = round(MARGIN * height)
        wide = int(high * image.width / image.height)
    left, top = round((wide - width) / 2), round((high - height) / 2)
    scaled = image.resize((wide, high), Image.Resampling.BILINEAR)
    return np.asarray(scaled.crop((left, top, left + width, top + height)))


def random_words(seed: int, epoch: int, example: int) -> np.ndarray:
    """The random numbers of one view, in [0, 1): float64 ``[41]``.

    They belong to the example and not to a place in a stream, so that it makes no difference which
    process draws them, or when. Raw words of PCG64 are what NumPy promises never to change.
    """
    words = np.random.PCG64([seed, epoch, example]).random_raw(_WORDS)
    return (words >> np.uint64(11)) * 2.0**-53


def random_box(width: int, height: int, words: np.ndarray) -> tuple[int, int, int, int]:
    """A part of an image with 8% to all of its area and a ratio of sides from 3/4 to 4/3.

    As in torchvision: area and logarithm of the ratio are uniform; the first of ten draws that fits
    is taken, and if there is none, the middle.

    Args:
      width, height: of the image.
      words: uniform in [0, 1), four for each draw: area, ratio, left and top.

    Returns:
      Left, top, width and height of the part.

    Example:
      >>> random_box(100, 100, np.zeros(40))
      (0, 0, 24, 33)
    """
    for area, ratio, left, top in words[: 4 * _TRIES].reshape(_TRIES, 4):
        pixels = (_SCALE[0] + (_SCALE[1] - _SCALE[0]) * area) * width * height
        low, high = np.log(_RATIO)
        sides = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(pixels * sides)), round(math.sqrt(pixels / sides))
        if 0 < w <= width and 0 < h <= height:
            return int(left * (width - w + 1)), int(top * (height - h + 1)), w, h
    w = min(width, max(1, round(height * _RATIO[1])))
    h = min(height, max(1, round(width / _RATIO[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def random_view(
    file: Image.Image, size: tuple[int, int], *, words: np.ndarray, flip: bool
) -> np.ndarray:
    """A part of an image drawn at random, scaled to a size and, with ``flip``, perhaps mirrored.

    A JPEG that is more than twice as large as needed is decoded at a half, a quarter or an eighth
    of its size, which its format allows at a fraction of the time.

    Args:
      file: the image, not yet loaded.
      size: height and width.
      words: of :func:`random_words`.
      flip: whether to mirror with probability 1/2.
    """
    turned = file.getexif().get(0x0112) in (5, 6, 7, 8)
    width, height = file.size[::-1] if turned else file.size
    left, top, w, h = random_box(width, height, words)
    scale = max(size[1] / w, size[0] / h)
    file.draft(None, (math.ceil(scale * file.width), math.ceil(scale * file.height)))
    image = to_rgb(file)
    # In this order no rounding leads out of the image.
    x0, x1 = (edge * image.width / width for edge in (left, left + w))
    y0, y1 = (edge * image.height / height for edge in (top, top + h))
    part = image.resize(size[::-1], Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))
    if flip and words[-1] < 0.5:
        part = ImageOps.mirror(part)
    return np.asarray(part)
