"""The paper's data sets, read from real array_record files with small pictures in them."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from experiments.data import DataError, Dataset, load
from experiments.data.prepared import SPECS, default_data_dir, find_prepared

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

F = tfds.features


def encode(image: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def picture(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth noise, so that JPEG and resampling have something to keep."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return noise.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def mask(width: int, height: int) -> bytes:
    return encode(Image.new("L", (width, height), 1), "PNG")


def image_features(name: str) -> dict:
    """Features as the builder of that name declares them, in the release of the paper's data."""
    names = [f"class {i}" for i in range(SPECS[name].num_classes)]
    label = F.ClassLabel(num_classes=len(names))
    named = F.ClassLabel(names=names)
    free_mask = F.Image(shape=(None, None, 1))
    return {
        "cifar10": {"id": F.Text(), "image": F.Image(shape=(32, 32, 3)), "label": label},
        "cifar100": {
            "id": F.Text(),
            "image": F.Image(shape=(32, 32, 3)),
            "label": label,
            "coarse_label": F.ClassLabel(num_classes=20),
        },
        "oxford_flowers102": {"image": F.Image(), "label": named, "file_name": F.Text()},
        "oxford_iiit_pet": {
            "image": F.Image(encoding_format="jpeg"),
            "label": named,
            "species": F.ClassLabel(names=["Cat", "Dog"]),
            "file_name": F.Text(),
            "segmentation_mask": F.Image(shape=(None, None, 1), use_colormap=True),
            "head_bbox": F.BBoxFeature(),
        },
        "cars196": {"image": F.Image(), "label": named, "bbox": F.BBoxFeature(), "id": F.Text()},
        "caltech_birds2011": {
            "image": F.Image(),
            "image/filename": F.Text(),
            "label": label,
            "label_name": F.Text(),
            "bbox": F.BBoxFeature(),
            "segmentation_mask": free_mask,
        },
    }[name]


def fill(features: dict, encoded: bytes, label: int) -> dict:
    """An example with every feature there is."""
    example = {}
    for key, feature in features.items():
        if key in ("image", "photo"):
            example[key] = encoded
        elif key in ("label", "kind"):
            example[key] = label
        elif isinstance(feature, F.Image):
            example[key] = mask(3, 3)
        elif isinstance(feature, F.BBoxFeature):
            example[key] = F.BBox(0.0, 0.0, 1.0, 1.0)
        elif isinstance(feature, F.ClassLabel):
            example[key] = 0
        else:
            example[key] = "text"
    return example


def prepare(
    data_dir: Path,
    name: str,
    splits: dict[str, list[tuple[bytes, int]]],
    *,
    version: str = "3.0.2",
    features: dict | None = None,
    file_format: str = "array_record",
) -> Path:
    """Writes what ``tfds build`` would write, from encoded images."""
    features = image_features(name) if features is None else features

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples):
            for index, (encoded, label) in enumerate(examples):
                yield index, fill(features, encoded, label)

    Builder.name = name
    builder = Builder(data_dir=data_dir, file_format=file_format)
    builder.download_and_prepare()
    return Path(builder.data_dir)


def examples_of(name: str, split: str, count: int) -> list[tuple[bytes, int]]:
    rng = np.random.default_rng(list(f"{name} {split}".encode()))
    examples = []
    for i in range(count):
        if name.startswith("cifar"):
            encoded = encode(picture(rng.integers(1 << 30), 32, 32), "PNG")
        else:
            mode = ("RGB", "L")[i % 7 == 3]  # grey pictures occur among the birds and flowers
            width, height = rng.integers(40, 90, 2)
            encoded = encode(picture(rng.integers(1 << 30), width, height, mode), "JPEG")
        examples.append((encoded, i % min(5, SPECS[name].num_classes)))
    return examples


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """All six, prepared once: 40 pictures to train on, 20 to test on."""
    root = tmp_path_factory.mktemp("tensorflow_datasets")
    for name, spec in SPECS.items():
        counts = {"train": 40, "test": 20} | ({"validation": 15} if spec.validation else {})
        prepare(root, name, {s: examples_of(name, s, n) for s, n in counts.items()})
    return root


@pytest.fixture
def cifar(data_dir, tmp_path) -> Path:
    """A copy to damage; its version directory."""
    shutil.copytree(data_dir / "cifar10", tmp_path / "cifar10")
    return tmp_path / "cifar10" / "3.0.2"


def shard(version_dir: Path, split: str = "train") -> Path:
    (path,) = version_dir.glob(f"*-{split}.array_record-*")
    return path


def fails(name: str, data_dir: Path, match: str, **options) -> None:
    with pytest.raises(DataError, match=match) as caught:
        load(name, data_dir=data_dir, **options)
    assert "\n" not in str(caught.value)


def expected(examples: list[tuple[bytes, int]], size: tuple[int, int]) -> list[tuple[bytes, int]]:
    """What examples look like once loaded, by another route: Pillow's own fit."""
    fitted = []
    for encoded, label in examples:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        fit = ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR)
        fitted.append((fit.tobytes(), label))
    return sorted(fitted)


def loaded(*splits) -> list[tuple[bytes, int]]:
    return sorted(
        (image.tobytes(), int(label))
        for split in splits
        for image, label in zip(split.images, split.labels, strict=True)
    )


@pytest.mark.parametrize("name", SPECS)
def test_each_data_set(name, data_dir):
    spec = SPECS[name]
    data = load(name, data_dir=data_dir, image_size=None if "cifar" in name else 48)
    size = (32, 32) if "cifar" in name else (48, 48)
    assert (data.image_size, data.channels, data.num_classes) == (size, 3, spec.num_classes)
    assert loaded(data.test) == expected(examples_of(name, "test", 20), size)
    train = expected(examples_of(name, "train", 40), size)
    if spec.validation:
        assert loaded(data.train) == train
        assert loaded(data.validation) == expected(examples_of(name, "validation", 15), size)
    else:
        assert len(data.validation) == 4
        assert loaded(data.train, data.validation) == train


def test_default_size_and_limit(data_dir):
    data = load("cars196", data_dir=data_dir, limit=3)
    assert data.train.images.shape == data.test.images.shape == (3, 224, 224, 3)


def test_a_limit_takes_prefixes_and_holds_out_the_same(data_dir):
    whole = load("cifar10", data_dir=data_dir, validation_fraction=0.25)
    part = load("cifar10", data_dir=data_dir, validation_fraction=0.25, limit=10)
    for field in ("train", "validation", "test"):
        np.testing.assert_array_equal(
            getattr(part, field).images, getattr(whole, field).images[:10]
        )
        assert np.bincount(getattr(part, field).labels).tolist() == [2] * 5


def test_the_seed_moves_only_validation(data_dir):
    first, second = (load("cifar10", data_dir=data_dir, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(first.test.images, second.test.images)
    assert loaded(first.validation) != loaded(second.validation)
    assert loaded(first.train, first.validation) == loaded(second.train, second.validation)


def test_files_in_another_order_give_the_same_splits(data_dir, tmp_path):
    prepare(
        tmp_path,
        "cifar10",
        {
            split: examples_of("cifar10", split, n)[::-1]
            for split, n in (("train", 40), ("test", 20))
        },
    )
    first, second = (load("cifar10", data_dir=root) for root in (data_dir, tmp_path))
    for field in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(first, field).images, getattr(second, field).images)


def test_every_colour_mode_becomes_rgb(tmp_path):
    base = picture(0, 32, 32)
    palette = base.convert("P")
    palette.info["transparency"] = bytes(range(256))
    files = [
        encode(base, "PNG"),
        encode(base.convert("L"), "PNG"),
        encode(base.convert("1"), "PNG"),
        encode(base.convert("LA"), "PNG"),
        encode(base.convert("RGBA"), "PNG"),
        encode(palette, "PNG"),
        encode(base.convert("CMYK"), "JPEG"),
    ]
    examples = [(file, i) for i, file in enumerate(files)]
    prepare(tmp_path, "cifar10", {"train": examples, "test": examples})
    test = load("cifar10", data_dir=tmp_path, validation_fraction=0.3).test
    by_label = dict(zip(test.labels.tolist(), test.images, strict=True))
    np.testing.assert_array_equal(by_label[0], np.asarray(base))
    np.testing.assert_array_equal(by_label[4], np.asarray(base))
    grey = np.repeat(np.asarray(base.convert("L"))[..., None], 3, axis=2)
    np.testing.assert_array_equal(by_label[1], grey)
    np.testing.assert_array_equal(by_label[3], grey)
    for label in (5, 6):  # a palette and CMYK lose a little colour
        assert np.abs(by_label[label].astype(int) - np.asarray(base)).mean() < 40


def test_tensorflow_is_not_imported_even_where_it_is_installed(data_dir, tmp_path):
    trap = tmp_path / "tensorflow"
    trap.mkdir()
    (trap / "__init__.py").write_text("raise RuntimeError('tensorflow was imported')")
    code = (
        "import sys; from experiments.data import load;"
        f"load('oxford_iiit_pet', data_dir={str(data_dir)!r}, image_size=16);"
        "assert 'tensorflow' not in sys.modules; print('loaded')"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")]), "."])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert (done.stdout.strip(), done.returncode) == ("loaded", 0), done.stderr


def test_not_prepared(tmp_path):
    fails(
        "cars196",
        tmp_path,
        f"cars196 is not prepared in {tmp_path}: "
        f"run tfds build cars196 --file_format=array_record --data_dir={tmp_path}",
    )
    assert not list(tmp_path.iterdir())


def test_where_data_are_looked_for(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert isinstance(load("cifar10", limit=2), Dataset)
    monkeypatch.setenv("TFDS_DATA_DIR", "")
    monkeypatch.setenv("HOME", "/somewhere")
    assert default_data_dir() == Path("/somewhere/tensorflow_datasets")


def test_the_newest_array_record_version_is_read(data_dir, tmp_path):
    for version in ("3.0.2", "3.0.10", "2.9.9"):
        shutil.copytree(data_dir / "cifar10" / "3.0.2", tmp_path / "cifar10" / version)
    (tmp_path / "cifar10" / "incomplete.9.9.9").mkdir()
    assert find_prepared("cifar10", tmp_path).name == "3.0.10"
    info = tmp_path / "cifar10" / "3.0.10" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    assert find_prepared("cifar10", tmp_path).name == "3.0.2"


def test_only_another_format(cifar):
    info = cifar / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    fails(
        "cifar10",
        cifar.parents[1],
        "prepared in .* as tfrecord, not as array_record: run tfds "
        "convert_format --dataset_dir=.*/cifar10 --out_file_format=array_record",
    )


def test_array_record_beside_another_format(cifar):
    info = cifar / "dataset_info.json"
    info.write_text(
        info.read_text().replace(
            '"fileFormat": "array_record"',
            '"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]',
        )
    )
    assert len(load("cifar10", data_dir=cifar.parents[1]).test) == 20


@pytest.mark.parametrize(
    "module", ["tensorflow_datasets", "array_record.python.array_record_module"]
)
def test_missing_packages_name_the_extra(module, data_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    fails("cifar10", data_dir, r"install it with pip install 'fqt-jax\[tfds\]'")


@pytest.mark.parametrize("size", [0, 1000, 70_000, 131_072, -1])
def test_truncated_records(size, cifar):
    path = shard(cifar)
    content = path.read_bytes()
    assert len(content) > 131_072
    path.write_bytes(content[:size])
    fails("cifar10", cifar.parents[1], "3.0.2 split train, record 0: cannot be read: ")


def test_damaged_records(cifar):
    path = shard(cifar, "test")
    content = bytearray(path.read_bytes())
    content[9000:12000] = bytes(3000)
    path.write_bytes(content)
    fails("cifar10", cifar.parents[1], r"split test, record \d+: cannot be read: .*hash mismatch")


def test_missing_records(cifar):
    shard(cifar).unlink()
    fails("cifar10", cifar.parents[1], "split train, record 0: cannot be read: .*No such file")


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_damaged_description(file, cifar):
    (cifar / file).write_text("{")
    fails("cifar10", cifar.parents[1], "3.0.2.*: cannot be read: ")


def test_records_that_are_fewer_than_described(cifar):
    info = cifar / "dataset_info.json"
    info.write_text(info.read_text().replace('"40"', '"41"'))
    fails("cifar10", cifar.parents[1], "split train, record 40: cannot be read: ")


def without(features: dict, key: str) -> dict:
    return {name: feature for name, feature in features.items() if name != key}


@pytest.mark.parametrize("key", ["image", "label"])
def test_missing_features(key, tmp_path):
    examples = examples_of("cifar10", "train", 5)
    features = without(image_features("cifar10"), key)
    prepare(tmp_path, "cifar10", {"train": examples, "test": examples}, features=features)
    fails("cifar10", tmp_path, f"no feature '{key}' among i")


def test_records_without_what_the_description_promises(cifar, tmp_path):
    features = without(image_features("cifar10"), "label")
    examples = examples_of("cifar10", "train", 5)
    other = prepare(tmp_path / "b", "cifar10", {"train": examples}, features=features)
    shutil.copy(shard(other), shard(cifar))
    fails("cifar10", cifar.parents[1], "split train, record 0: it has no 'label'")


def test_wrong_number_of_classes(tmp_path):
    features = image_features("cifar10") | {"label": F.ClassLabel(num_classes=7)}
    examples = examples_of("cifar10", "train", 5)
    prepare(tmp_path, "cifar10", {"train": examples, "test": examples}, features=features)
    fails("cifar10", tmp_path, "7 classes where 10 are expected")


def test_missing_split(tmp_path):
    examples = examples_of("oxford_flowers102", "train", 5)
    prepare(tmp_path, "oxford_flowers102", {"train": examples, "test": examples})
    fails("oxford_flowers102", tmp_path, "no split 'validation' among test, train")


def test_unreadable_images(tmp_path):
    good = examples_of("cifar10", "train", 5)
    cut = [(encoded[: len(encoded) // 2], label) for encoded, label in good]
    prepare(tmp_path, "cifar10", {"train": good, "test": cut}, version="1.0.0")
    options = {"validation_fraction": 0.3}
    fails("cifar10", tmp_path, r"split test, record \d: not a readable image: ", **options)
    text = [(b"text", label) for _, label in good]
    prepare(tmp_path, "cifar10", {"train": text, "test": good}, version="1.0.1")
    for stream in ("no", "yes"):  # before it streams
        options["stream"] = stream
        fails("cifar10", tmp_path, "not a readable image: cannot identify image file", **options)


def test_unlabelled_examples(tmp_path):
    good = examples_of("cifar10", "train", 20)
    prepare(tmp_path, "cifar10", {"train": good, "test": [(good[0][0], -1)]})
    fails("cifar10", tmp_path, "cifar10: the test split has label -1")


def any_set(tmp_path: Path, features: dict, splits=("train", "test")) -> None:
    """A data set that the library has never heard of."""
    pictures = [picture(number, 20, 20) for number in range(24)]
    rows = {
        split: [(encode(pictures[12 * i + n], "PNG"), n % 3) for n in range(12)]
        for i, split in enumerate(splits)
    }
    prepare(tmp_path, "flora", rows, features=features)


def test_any_image_classification_set_is_read(tmp_path):
    label = F.ClassLabel(names=["rose", "tulip", "daisy"])
    any_set(tmp_path, {"photo": F.Image(), "kind": label})
    data = load("flora", data_dir=tmp_path, image_size=8, validation_fraction=0.25)
    assert (data.num_classes, data.class_names) == (3, ("rose", "tulip", "daisy"))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [9, 3, 12]
    fails("fauna", tmp_path, "unknown data set 'fauna'; known: .* prepared in .*: flora")


def test_a_set_without_a_test_split_is_tested_on_its_validation_split(tmp_path):
    label = F.ClassLabel(num_classes=3)
    any_set(tmp_path, {"image": F.Image(), "label": label}, ("train", "validation"))
    data = load("flora", data_dir=tmp_path, image_size=8, validation_fraction=0.25)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [9, 3, 12]
    assert data.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"one": F.Image(), "two": F.Image()}, "several features could be the image: one, two"),
        ({"image": F.Image(), "rank": F.Text()}, "no feature 'label' among image, rank"),
    ],
)
def test_a_set_that_is_no_image_classification_is_named(features, message, tmp_path):
    label = {} if "rank" in features else {"label": F.ClassLabel(num_classes=3)}
    any_set(tmp_path, {**features, **label})
    fails("flora", tmp_path, message)
