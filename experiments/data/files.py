"""A user's own images: a folder with one folder for each class, or arrays in an .npz file."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments.data.dataset import DataError
from experiments.data.images import check, opened, parallel_map
from experiments.data.pictures import ArrayPictures, Pictures, R
from experiments.data.splits import TEST_SEED, Source, content_key, content_keys, stratified_order

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Of the files that count as images."""

_TEST_NAMES = ("test", "val")
_SPLITS = ("train", "val", "test")


class Own(NamedTuple):
    """Examples of a user's own data.

    Attributes:
      train, test, validation: examples; ``validation`` is ``None`` where it is to be held out.
      num_classes: labels lie in ``[0, num_classes)``.
      class_names: of each label; empty where they are numbers.
    """

    train: Source
    test: Source
    validation: Source | None
    num_classes: int
    class_names: tuple[str, ...]


def from_folder(
    folder: Path,
    *,
    image_size: tuple[int, int],
    seed: int,
    test_fraction: float = 0.2,
    check_all: bool = False,
) -> Own:
    """Images in ``folder/CLASS/*.jpg``, or in ``folder/{train,val,test}/CLASS/*.jpg``.

    Without folders for the splits, ``test_fraction`` of the images is the test split, each class in
    proportion, chosen by the images' content alone. With them, ``train`` and ``test`` or ``val``
    are needed; with all three ``val`` is the validation split, and with two the test split.

    Args:
      folder: the folder. Names that begin with a dot are left out, and so are files whose suffix
        is none of ``SUFFIXES``.
      image_size: height and width.
      seed: of the keys by which validation data are held out.
      test_fraction: part of the images that is the test split, where there are no folders for it.
      check_all: whether to look at the headers of all files now, and not only as they are decoded.

    Raises:
      DataError: the folder is missing, has not two classes, a class has no image, the splits have
        different classes, or a file is no image; it is named.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is {'no folder' if folder.exists() else 'not there'}.")
    names = {path.name for path in _folders(folder)}
    if "train" not in names or not names <= set(_SPLITS):
        classes = _classes(folder)
        files, labels = _listed(folder, classes)
        keys = _keys(files, (TEST_SEED, seed), check_all)
        order = stratified_order(labels, keys[0])
        count = round(test_fraction * len(order))
        if not 0 < count < len(order):
            raise DataError(f"{folder} has only {len(order)} images.")
        parts = (("test", order[:count], keys[0]), ("train", order[count:], keys[1]))
        chosen = {
            name: ([files[i] for i in indices], labels[indices], own[indices])
            for name, indices, own in parts
        }
    else:
        classes = _classes(folder / "train")
        listed = {name: _listed(folder / name, classes) for name in _SPLITS if name in names}
        if "test" not in listed:
            if "val" not in listed:
                raise DataError(f"{folder} has a folder train, but neither test nor val.")
            listed["test"] = listed.pop("val")
        chosen = {}
        for name, (files, labels) in listed.items():
            (keys,) = _keys(files, (TEST_SEED if name == "test" else seed,), check_all)
            chosen[name] = (files, labels, keys)
    made = {
        name: Source(labels, keys, Files([str(path) for path in files]), image_size)
        for name, (files, labels, keys) in chosen.items()
    }
    return Own(made["train"], made["test"], made.get("val"), len(classes), tuple(classes))


def from_npz(
    path: Path, *, image_size: tuple[int, int] | None, seed: int, test_fraction: float = 0.2
) -> tuple[Own, tuple[int, int]]:
    """Arrays ``images`` and ``labels``, or ``train_images``, ``train_labels``, ``test_images`` ...

    ``images`` is ``uint8[N, H, W]`` or ``uint8[N, H, W, C]`` with 1 or 3 channels, ``labels`` an
    integer array ``[N]``. Without arrays of the splits the test split is chosen as
    :func:`from_folder` does.

    Args:
      path: the file. No object in it is unpickled.
      image_size: height and width; ``None`` for that of the images.
      seed: of the keys by which validation data are held out.
      test_fraction: part of the images that is the test split, where there are no arrays for it.

    Returns:
      The examples, and height and width.

    Raises:
      DataError: the file is missing or damaged, or an array is missing or of another kind.
    """
    if not path.is_file():
        raise DataError(f"{path} is {'no file' if path.exists() else 'not there'}.")
    if not zipfile.is_zipfile(path):
        # NumPy takes whatever it does not know for pickled objects.
        raise DataError(f"{path} is no .npz file: it is no archive.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise DataError(f"{path} cannot be read as an .npz file: {reason}.") from None
    pairs = {}
    for split in ("", "train_", "val_", "test_"):
        if f"{split}images" in arrays or f"{split}labels" in arrays:
            pairs[split.rstrip("_")] = _checked(path, arrays, split)
    if set(pairs) not in ({""}, {"train", "test"}, {"train", "val", "test"}):
        raise DataError(
            f"{path} must hold images and labels, or train_images, train_labels, test_images and "
            f"test_labels; it holds {', '.join(sorted(arrays)) or 'nothing'}."
        )
    sizes = {images.shape[1:] for images, _ in pairs.values()}
    if len(sizes) > 1:
        raise DataError(f"{path}: the splits' images differ in shape: {sorted(sizes)}.")
    height, width, _ = sizes.pop()
    size = image_size or (height, width)
    num_classes = 1 + max(int(labels.max()) for _, labels in pairs.values())
    if "" in pairs:
        images, labels = pairs.pop("")
        keys = content_keys((image.tobytes() for image in images), TEST_SEED)
        order = stratified_order(labels, keys)
        count = round(test_fraction * len(order))
        if not 0 < count < len(order):
            raise DataError(f"{path} has only {len(order)} images.")
        pairs = {
            "test": (images[order[:count]], labels[order[:count]]),
            "train": (images[order[count:]], labels[order[count:]]),
        }
    made = {
        name: _array_source(images, labels, size, TEST_SEED if name == "test" else seed)
        for name, (images, labels) in pairs.items()
    }
    return Own(made["train"], made["test"], made.get("val"), num_classes, ()), size


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _classes(folder: Path) -> list[str]:
    classes = [path.name for path in _folders(folder)]
    if len(classes) < 2:
        found = f"only {classes[0]}" if classes else "none"
        raise DataError(f"{folder} must have a folder for each class, two or more; it has {found}.")
    return classes


def _listed(folder: Path, classes: list[str]) -> tuple[list[Path], np.ndarray]:
    """The images of a split and their labels, in the order of their names."""
    found = [path.name for path in _folders(folder)]
    if found != classes:
        odd = sorted(set(found) ^ set(classes))
        raise DataError(f"{folder} has other classes than the training images: {', '.join(odd)}.")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = sorted(
            path
            for path in (folder / name).rglob("*")
            if path.suffix.lower() in SUFFIXES
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        if not images:
            raise DataError(f"{folder / name} holds no image ({', '.join(SUFFIXES)}).")
        files += images
        labels += [label] * len(images)
    return files, np.array(labels, np.int32)


class Files(Pictures):
    """Image files.

    Args:
      paths: of the files.
    """

    def __init__(self, paths: Sequence[str]):
        self._paths = paths

    def see(self, index: int, view: Callable[[Image.Image], R]) -> R:
        path = Path(self._paths[index])
        encoded = _read(path)
        with _naming(path):
            return opened(encoded, view)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from None


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _keys(files: list[Path], seeds: tuple[int, ...], check_all: bool) -> np.ndarray:
    """Keys by several seeds, for which each file is read once: uint64 ``[seeds, files]``."""

    def keys(path: Path) -> list[int]:
        encoded = _read(path)
        if check_all:
            with _naming(path):
                check(encoded)
        return [content_key(encoded, seed) for seed in seeds]

    return np.array(parallel_map(keys, files), np.uint64).T


def _checked(
    path: Path, arrays: dict[str, np.ndarray], split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[N, H, W, C]`` and labels of one split."""
    for name in (f"{split}images", f"{split}labels"):
        if name not in arrays:
            raise DataError(f"{path} has no array {name}.")
    images, labels = arrays[f"{split}images"], arrays[f"{split}labels"]
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise DataError(
            f"{path}: {split}images must be uint8 [N, H, W] or [N, H, W, C] with 1 or 3 channels; "
            f"it is {images.dtype} {list(arrays[f'{split}images'].shape)}."
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{path}: {split}labels must be {len(images)} integers; it is {labels.dtype} "
            f"{list(labels.shape)}."
        )
    if not images.size:
        raise DataError(f"{path}: {split}images is empty.")
    if labels.min() < 0 or labels.max() > 1_000_000:
        raise DataError(
            f"{path}: {split}labels must count the classes from 0; they reach from "
            f"{labels.min()} to {labels.max()}."
        )
    return images, labels.astype(np.int32)


def _array_source(
    images: np.ndarray, labels: np.ndarray, size: tuple[int, int], seed: int
) -> Source:
    keys = content_keys((image.tobytes() for image in images), seed)
    return Source(labels, keys, ArrayPictures(images), size)
