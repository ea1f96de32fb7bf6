"""Pillow's part: encoded bytes or small arrays become uint8 images of one size."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from experiments.data.dataset import DataError

T = TypeVar("T")
R = TypeVar("R")


def parallel_map(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``list(map(function, items))`` on threads: Pillow and file reads release the lock.

    The first item that fails, in the order given, decides the error; the rest is cancelled.

    Example:
      >>> parallel_map(abs, [-1, 2, -3])
      [1, 2, 3]
    """
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def resize(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Scales the shorter side to fit and cuts out the centre, in one bilinear resampling.

    Bilinear in Pillow widens its kernel when it shrinks an image, so nothing is aliased. An image
    that has the wanted size already is returned unchanged.

    Args:
      image: a Pillow image of mode ``"L"`` or ``"RGB"``.
      size: height and width of the result.

    Returns:
      uint8 ``[H, W, C]``, C being 1 or 3.

    Example:
      >>> wide = Image.fromarray(np.repeat(np.uint8([[0, 90, 90, 0]]), 2, axis=0))
      >>> resize(wide, (2, 2))[..., 0]
      array([[90, 90],
             [90, 90]], dtype=uint8)
    """
    height, width = size
    scale = min(image.width / width, image.height / height)
    left = (image.width - scale * width) / 2
    top = (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    array = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))
    return array.reshape(height, width, -1)


def to_rgb(file: Image.Image) -> Image.Image:
    """An image of any colour mode as RGB, turned as its EXIF data say; transparency is dropped."""
    image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16 bits: Pillow would cut off what exceeds 255
        levels = np.asarray(image).astype(np.uint32)
        return Image.fromarray((levels.clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    # A palette with transparency has to pass through RGBA on its way to RGB.
    return (image.convert("RGBA") if image.has_transparency_data else image).convert("RGB")


def check(encoded: bytes) -> None:
    """Reads the header of an image file, which takes a hundredth of the time of decoding it.

    Raises:
      DataError: it is no image. One that is cut short is not found out.
    """
    opened(encoded, lambda image: image.size)


def opened(encoded: bytes, view: Callable[[Image.Image], R]) -> R:
    """Applies a function to an image file of any format that Pillow reads.

    Args:
      encoded: the bytes of the file.
      view: of the Pillow image, whose pixels are decoded only when it uses them.

    Raises:
      DataError: the bytes are not an image, or are cut short.

    Example:
      >>> opened(b"not an image", to_rgb)
      Traceback (most recent call last):
        ...
      experiments.data.dataset.DataError: not a readable image: cannot identify image file ...
    """
    try:
        with Image.open(io.BytesIO(encoded)) as file:
            return view(file)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises each of these
        reason = str(error).partition("\n")[0].rstrip(".")
        raise DataError(f"not a readable image: {reason}.") from error
