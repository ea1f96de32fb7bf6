"""The paper's data sets, as tensorflow-datasets prepares them, read without TensorFlow.

``tfds build`` (which needs TensorFlow) writes ``DATA_DIR/NAME/VERSION/`` with a description and
array_record files. They describe themselves, so reading needs no code of the data set: examples
come as serialized ``tf.train.Example`` messages, of which only ``image`` and ``label`` are looked
at, and Pillow decodes the images. Nothing here downloads anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.dataset import DataError, import_extra
from experiments.data.images import decode_rgb, parallel_map
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


def _source(builder: Any, split: str, image_size: tuple[int, int], seed: int) -> Source:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

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

    def example(index: int) -> tuple[bytes, int]:
        feature = tf_example_pb2.Example.FromString(records[int(index)]).features.feature
        for key in ("image", "label"):
            if key not in feature:
                raise DataError(f"it has no {key!r}.")
        images, labels = feature["image"].bytes_list.value, feature["label"].int64_list.value
        if len(images) != 1 or len(labels) != 1:
            raise DataError(f"it has {len(images)} encoded images and {len(labels)} labels.")
        return images[0], labels[0]

    def label_and_key(index: int) -> tuple[np.int32, int]:
        with _reading(f"{where}, record {index}"):
            image, label = example(index)
            return np.int32(label), content_key(image, seed)

    def decode(indices: np.ndarray) -> np.ndarray:
        images = np.empty((len(indices), *image_size, 3), np.uint8)

        def decode_into(position: int) -> None:
            with _reading(f"{where}, record {indices[position]}"):
                images[position] = decode_rgb(example(indices[position])[0], image_size)

        parallel_map(decode_into, range(len(indices)))
        return images

    pairs = parallel_map(label_and_key, range(count))
    labels = np.array([label for label, _ in pairs], np.int32)
    keys = np.array([key for _, key in pairs], np.uint64)
    return Source(labels, keys, decode)


def sources(
    name: str, *, image_size: tuple[int, int], seed: int, data_dir: Path
) -> tuple[Source, Source, Source | None]:
    """Training, test and, where the data set has its own, validation examples.

    Args:
      name: one of ``SPECS``.
      image_size: height and width.
      seed: of the keys by which validation data are held out.
      data_dir: where data sets are prepared.

    Raises:
      DataError: tensorflow-datasets or array_record is not installed; the data set is not
        prepared; its files are damaged; it lacks a split or a feature.
    """
    spec = SPECS[name]
    tfds = import_extra("tensorflow_datasets", "tfds")
    import_extra("array_record.python.array_record_module", "tfds")
    directory = find_prepared(name, data_dir)
    with _reading(directory):
        builder = tfds.builder_from_directory(directory)
        features = builder.info.features
        for key in ("image", "label"):
            if key not in features:
                raise DataError(f"no feature {key!r} among {', '.join(sorted(features))}.")
        num_classes = getattr(features["label"], "num_classes", None)
        if num_classes != spec.num_classes:
            raise DataError(f"{num_classes} classes where {spec.num_classes} are expected.")
        splits = ("train", "test", "validation")[: 3 if spec.validation else 2]
        for split in splits:
            if split not in builder.info.splits:
                raise DataError(
                    f"no split {split!r} among {', '.join(sorted(builder.info.splits))}."
                )
    train, test, *rest = [
        _source(builder, split, image_size, TEST_SEED if split == "test" else seed)
        for split in splits
    ]
    return train, test, rest[0] if rest else None
