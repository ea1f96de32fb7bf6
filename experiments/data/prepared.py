"""Image classification sets as tensorflow-datasets prepares them, read without TensorFlow.

``tfds build`` (which needs TensorFlow) writes ``DATA_DIR/NAME/VERSION/`` with a description and
array_record files. They describe themselves, so reading needs no code of the data set: examples
come as serialized ``tf.train.Example`` messages, of which only the image and the label are looked
at, and Pillow decodes the images. Nothing here downloads anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from experiments.data.dataset import DataError, import_extra
from experiments.data.images import check, opened, parallel_map
from experiments.data.pictures import Pictures, R
from experiments.data.splits import TEST_SEED, Source, content_key


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a prepared data set before it is opened.

    Args:
      num_classes: its labels lie in ``[0, num_classes)``.
      image_size: height and width unless asked otherwise.
      validation: whether it has a validation split of its own.
    """

    num_classes: int
    image_size: tuple[int, int] = (224, 224)
    validation: bool = False


SPECS: dict[str, Spec] = {
    "cifar10": Spec(10, (32, 32)),
    "cifar100": Spec(100, (32, 32)),
    "oxford_flowers102": Spec(102, validation=True),
    "oxford_iiit_pet": Spec(37),
    "cars196": Spec(196),
    "caltech_birds2011": Spec(200),
}


def default_data_dir() -> Path:
    """``$TFDS_DATA_DIR``, or ``~/tensorflow_datasets``."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


@contextlib.contextmanager
def _reading(what: object) -> Iterator[None]:
    # The libraries below raise RuntimeError, ValueError, OSError and errors of their own for the
    # same thing: files that are not what they should be.
    try:
        yield
    except DataError as error:
        raise DataError(f"{what}: {error}") from error.__cause__
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise DataError(f"{what}: cannot be read: {reason}.") from error


def find_prepared(name: str, data_dir: Path) -> Path:
    """The newest version of a data set that is prepared as array_record files.

    Args:
      name: of the data set.
      data_dir: where data sets are prepared.

    Returns:
      ``data_dir / name / version``.

    Raises:
      DataError: there is none; the message names the command that prepares it.

    Example:
      >>> find_prepared("cifar10", Path("/nowhere"))
      Traceback (most recent call last):
        ...
      experiments.data.dataset.DataError: cifar10 is not prepared in /nowhere: run
        tfds build cifar10 --file_format=array_record --data_dir=/nowhere
        where TensorFlow is installed.
    """
    versions: dict[tuple[int, ...], Path] = {}
    others: set[str] = set()
    for info in (data_dir / name).glob("*/dataset_info.json"):
        if not re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name):
            continue
        with _reading(info):
            content = json.loads(info.read_text(encoding="utf-8"))
            formats = {content.get("fileFormat", "tfrecord")}
            formats.update(content.get("alternativeFileFormats", ()))
        if "array_record" in formats:
            versions[tuple(map(int, info.parent.name.split(".")))] = info.parent
        else:
            others |= formats
    if versions:
        return versions[max(versions)]
    found = f" as {', '.join(sorted(others))}, not as array_record" if others else ""
    command = (
        f"convert_format --dataset_dir={data_dir / name} --out_file_format=array_record"
        if others
        else f"build {name} --file_format=array_record --data_dir={data_dir}"
    )
    raise DataError(
        f"{name} is {'prepared' if others else 'not prepared'} in {data_dir}{found}: "
        f"run tfds {command} where TensorFlow is installed."
    )


class Records(Pictures):
    """The examples of a split, as serialized messages.

    Args:
      where: what they are called in messages.
      records: the array_record files; readers of them are opened again in another process.
      keys: the features that are image and label.
    """

    def __init__(self, where: str, records: Any, keys: tuple[str, str]):
        self._where, self._records, self._keys = where, records, keys

    def see(self, index: int, view: Callable[[Image.Image], R]) -> R:
        return self.read(index, lambda image, _: opened(image, view))

    def read(self, index: int, what: Callable[[bytes, int], R]) -> R:
        """A function of the encoded image and the label of an example.

        Raises:
          DataError: it cannot be read, or the function raises that; the message names the example.
        """
        from tensorflow_datasets.proto import tf_example_pb2

        with _reading(f"{self._where}, record {index}"):
            feature = tf_example_pb2.Example.FromString(self._records[index]).features.feature
            for key in self._keys:
                if key not in feature:
                    raise DataError(f"it has no {key!r}.")
            image, label = self._keys
            images, labels = feature[image].bytes_list.value, feature[label].int64_list.value
            if len(images) != 1 or len(labels) != 1:
                raise DataError(f"it has {len(images)} encoded images and {len(labels)} labels.")
            return what(images[0], labels[0])


def _source(
    builder: Any,
    split: str,
    keys: tuple[str, str],
    image_size: tuple[int, int],
    seed: int,
    check_all: bool,
) -> Source:
    import tensorflow_datasets as tfds

    where = f"{builder.data_dir} split {split}"
    with _reading(where):
        records = builder.as_data_source(
            split,
            # Parsing the message here is nine times as fast as letting the features do it, and
            # passes over segmentation masks.
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
            file_format="array_record",
        )
        count = len(records)
    # What lies below those of tensorflow-datasets, which also hold the whole description.
    pictures = Records(where, records.data_source, keys)

    def label_and_key(image: bytes, label: int) -> tuple[np.int32, int]:
        if check_all:
            check(image)
        return np.int32(label), content_key(image, seed)

    pairs = parallel_map(lambda index: pictures.read(index, label_and_key), range(count))
    labels = np.array([label for label, _ in pairs], np.int32)
    hashes = np.array([key for _, key in pairs], np.uint64)
    return Source(labels, hashes, pictures, image_size)


class Prepared(NamedTuple):
    """A prepared data set.

    Attributes:
      train, test, validation: examples; ``validation`` is ``None`` where the set has none.
      num_classes: its labels lie in ``[0, num_classes)``.
      class_names: of each label, where the description has them.
    """

    train: Source
    test: Source
    validation: Source | None
    num_classes: int
    class_names: tuple[str, ...]


def prepared_names(data_dir: Path) -> list[str]:
    """The data sets that are prepared in a folder."""
    return sorted({path.parents[1].name for path in data_dir.glob("*/*/dataset_info.json")})


def sources(
    name: str,
    *,
    image_size: tuple[int, int],
    seed: int,
    data_dir: Path,
    check_all: bool = False,
) -> Prepared:
    """The examples of a prepared data set.

    Of a set that is not in ``SPECS``, image and label are its only feature of either kind, or those
    called so; its test examples are the split ``test``, or ``validation`` where there is no
    ``test``.

    Args:
      name: of the data set.
      image_size: height and width.
      seed: of the keys by which validation data are held out.
      data_dir: where data sets are prepared.
      check_all: whether to look at the headers of all images now, not only as they are decoded.

    Raises:
      DataError: tensorflow-datasets or array_record is not installed; the data set is not
        prepared; its files are damaged; it lacks a split or a feature.
    """
    spec = SPECS.get(name)
    tfds = import_extra("tensorflow_datasets", "tfds")
    import_extra("array_record.python.array_record_module", "tfds")
    directory = find_prepared(name, data_dir)
    with _reading(directory):
        builder = tfds.builder_from_directory(directory)
        features = builder.info.features
        keys = (
            _feature(features, "image", tfds.features.Image),
            _feature(features, "label", tfds.features.ClassLabel),
        )
        label = features[keys[1]]
        if spec is not None and label.num_classes != spec.num_classes:
            raise DataError(f"{label.num_classes} classes where {spec.num_classes} are expected.")
        if label.num_classes is None:
            raise DataError(f"its description does not say how many classes {keys[1]!r} has.")
        train, test, validation = _splits(builder.info.splits, spec)

    def examples(split: str) -> Source:
        by = TEST_SEED if split == test else seed
        return _source(builder, split, keys, image_size, by, check_all)

    held = examples(validation) if validation else None
    names = tuple(map(str, label.names))  # those that were not given are the numbers
    return Prepared(examples(train), examples(test), held, label.num_classes, names)


def _feature(features: Any, key: str, kind: type) -> str:
    """The name of the only feature of a kind, or of the one that is called by it."""
    if key in features and isinstance(features[key], kind):
        return key
    found = [name for name in features if type(features[name]) is kind]
    if len(found) == 1:
        return found[0]
    if key in features or not found:
        raise DataError(f"no feature {key!r} among {', '.join(sorted(features))}.")
    raise DataError(f"several features could be the {key}: {', '.join(sorted(found))}.")


def _splits(found: Any, spec: Spec | None) -> tuple[str, str, str | None]:
    """The names of training, test and validation split."""
    test = "test" if "test" in found or spec is not None else "validation"
    wanted = ["train", test]
    if "validation" in found and test != "validation" and (spec is None or spec.validation):
        wanted.append("validation")
    if spec is not None and spec.validation and "validation" not in wanted:
        wanted.append("validation")
    for split in wanted:
        if split not in found:
            raise DataError(f"no split {split!r} among {', '.join(sorted(found))}.")
    return wanted[0], wanted[1], wanted[2] if len(wanted) == 3 else None
