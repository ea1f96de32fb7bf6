"""The embedded data sets, and what holds for splits of any data set."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import DATASETS, DataError, Dataset, Split, embedded, load
from experiments.data.dataset import channel_statistics
from experiments.data.pictures import ArrayPictures
from experiments.data.splits import Source, assemble, content_keys, stratified_order

SIZES = {"mnist5k": (3600, 400, 1000), "digits": (1080, 120, 597)}


@pytest.fixture(scope="module", params=SIZES)
def data(request) -> Dataset:
    return load(request.param)


def splits(data: Dataset) -> list[Split]:
    return [data.train, data.validation, data.test]


def contents(split: Split) -> list[bytes]:
    return [image.tobytes() for image in split.images]


def same(a: Split, b: Split) -> bool:
    return np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels)


def test_sizes_types_and_range(data):
    assert tuple(map(len, splits(data))) == SIZES[data.name]
    assert (data.num_classes, data.image_size, data.channels) == (10, (16, 16), 1)
    for split in splits(data):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert split.images.min() == 0
        assert split.images.max() >= 240


def test_splits_are_disjoint(data):
    # At full size no two images are equal, so equal bytes would be the same example.
    full = load(data.name, image_size=28 if data.name == "mnist5k" else 8)
    seen = [content for split in splits(full) for content in contents(split)]
    assert len(set(seen)) == len(seen) == sum(SIZES[data.name])


def test_splits_hold_the_classes_in_proportion(data):
    counts = [np.bincount(split.labels, minlength=10) for split in splits(data)]
    total = np.sum(counts, axis=0)
    for split_counts in counts:
        np.testing.assert_allclose(split_counts, total * split_counts.sum() / total.sum(), atol=1.5)


def test_loading_is_deterministic_and_seed_moves_only_validation(data):
    again, other = load(data.name), load(data.name, seed=1)
    assert all(map(same, splits(data), splits(again)))
    assert same(other.test, data.test)
    assert set(contents(other.validation)) != set(contents(data.validation))
    assert sorted(contents(other.train) + contents(other.validation)) == sorted(
        contents(data.train) + contents(data.validation)
    )


def test_a_limit_takes_prefixes(data):
    small = load(data.name, limit=50)
    for part, whole in zip(splits(small), splits(data), strict=True):
        assert same(part, Split(whole.images[:50], whole.labels[:50]))
        assert np.bincount(part.labels, minlength=10).tolist() == [5] * 10


def test_strokes_are_bright_on_a_dark_ground(data):
    ground = np.concatenate([data.train.images[:, :, :1], data.train.images[:, :, -1:]], axis=2)
    assert ground.mean() < 5 < 30 < data.train.images.mean() < 100


def test_the_two_sets_are_interchangeable():
    mnist, digits = (load(name, image_size=(12, 20), limit=4) for name in SIZES)
    assert mnist.train.images.shape == digits.train.images.shape == (4, 12, 20, 1)


def test_native_size_is_untouched():
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    data = load("digits", image_size=8)
    loaded = np.concatenate([split.images for split in splits(data)])
    levels = np.rint(loaded[..., 0] / 255 * 16)
    assert sorted(map(bytes, levels)) == sorted(map(bytes, sklearn.images))


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from experiments.data import load; load('digits', limit=10);"
        "print([m for m in ('tensorflow', 'tensorflow_datasets', 'jax', 'mlxtend')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "imagenet"},
            r"unknown data set 'imagenet'; known: mnist5k, digits, pydoc, cifar10",
        ),
        ({"validation_fraction": 0}, r"validation_fraction must lie in \(0, 1\); got 0"),
        ({"validation_fraction": 1.0}, r"validation_fraction must lie in \(0, 1\); got 1.0"),
        ({"validation_fraction": float("nan")}, r"validation_fraction must lie in .* got nan"),
        ({"validation_fraction": 1e-6}, r"validation_fraction=1e-06 of 1200 images leaves 0 for"),
        ({"limit": 0}, r"limit must be a positive integer or None; got 0"),
        ({"limit": True}, r"limit must be a positive integer or None; got True"),
        ({"image_size": 0}, r"image_size must be a positive integer or \(height, width\); got 0"),
        ({"image_size": (16,)}, r"image_size must be .* got \(16,\)"),
        ({"image_size": 16.0}, r"image_size must be .* got 16.0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(DataError, match=message) as caught:
        load(**{"name": "digits", **arguments})
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (np.full((1797, 8, 8), np.nan), np.zeros(1797, int), "finite and lie in"),
        (np.full((1797, 8, 8), 300.0), np.zeros(1797, int), "finite and lie in"),
        (np.zeros((1796, 8, 8)), np.zeros(1796, int), "expected 1797 images; got 1796"),
        (np.zeros((1797, 8, 8)), np.full(1797, 10), "label 10; labels must lie in"),
    ],
)
def test_packages_that_hold_something_else(monkeypatch, pixels, labels, message):
    monkeypatch.setitem(embedded._SETS, "digits", (lambda: (pixels, labels), 1797, 597))
    with pytest.raises(DataError, match=message):
        load("digits")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'fqt-jax\[experiments\]'"):
        load("digits")


IMAGES = np.zeros((4, 2, 2, 1), np.uint8)
LABELS = np.array([0, 1, 0, 1], np.int32)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[:3], LABELS, "3 images but 4 labels"),
        (IMAGES[:0], LABELS[:0], "a split is empty"),
        (IMAGES.astype(np.float32), LABELS, r"images must be uint8 with 4 axes; got float32\[4,"),
        (IMAGES[0], LABELS, "images must be uint8 with 4 axes"),
        (IMAGES, LABELS.astype(np.int64), "labels must be int32 with 1 axes; got int64"),
        (IMAGES, [0, 1, 0, 1], "labels must be int32 with 1 axes; got list"),
    ],
)
def test_invalid_splits(images, labels, message):
    with pytest.raises(DataError, match=message):
        Split(images, labels)


def test_invalid_datasets():
    split = Split(IMAGES, LABELS)
    with pytest.raises(DataError, match="toy: the test split has label -1"):
        Dataset("toy", split, split, Split(IMAGES, LABELS - 1), num_classes=2)
    with pytest.raises(DataError, match=r"toy: validation images are \[1, 2, 1\] but train"):
        Dataset("toy", split, Split(IMAGES[:, :1], LABELS), split, num_classes=2)


def toy_source(labels: np.ndarray, order: np.ndarray) -> Source:
    pixels = np.arange(len(labels), dtype=np.uint8)[order]
    keys = content_keys([bytes([pixel]) for pixel in pixels], seed=3)
    return Source(labels[order], keys, ArrayPictures(pixels[:, None, None, None]), (1, 1))


def test_splits_do_not_depend_on_the_order_of_a_file(rng):
    labels = rng.integers(0, 3, 60).astype(np.int32)
    options = {"validation": None, "validation_fraction": 0.2, "limit": None}
    loaded = [
        assemble(
            "toy", 3, train=toy_source(labels, order), test=toy_source(labels, order), **options
        )
        for order in (np.arange(60), rng.permutation(60))
    ]
    assert all(map(same, *map(splits, loaded)))
    assert len(loaded[0].validation) == 12


def test_an_empty_source_is_named():
    empty, full = toy_source(LABELS[:0], np.arange(0)), toy_source(LABELS, np.arange(4))
    with pytest.raises(DataError, match="toy: the test split is empty"):
        assemble(
            "toy", 2, train=full, test=empty, validation=full, validation_fraction=0.1, limit=None
        )


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 99))
def test_every_prefix_is_stratified(values, seed):
    labels = np.array(values)
    order = stratified_order(labels, content_keys([b"%d" % i for i in range(len(values))], seed))
    assert sorted(order) == list(range(len(values)))
    share = np.bincount(labels, minlength=5) / len(values)
    for m in range(len(values) + 1):
        counts = np.bincount(labels[order[:m]], minlength=5)
        assert np.all(
            np.abs(counts - share * m) <= 0.5 + share * np.count_nonzero(share) / 2 + 1e-9
        )


@given(st.integers(1, 600), st.integers(1, 3), st.integers(0, 9))
def test_channel_statistics(n, channels, seed):
    images = np.random.default_rng(seed).integers(0, 256, (n, 2, 3, channels), dtype=np.uint8)
    mean, std = channel_statistics(images)
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, images.mean((0, 1, 2), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(std, images.std((0, 1, 2), dtype=np.float64), rtol=1e-6)


def test_a_constant_channel_has_deviation_one():
    mean, std = channel_statistics(np.full((300, 1, 1, 2), 255, np.uint8))
    assert mean.tolist() == [255, 255]
    assert std.tolist() == [1, 1]


def test_names():
    assert DATASETS[:2] == ("mnist5k", "digits")
    assert len(DATASETS) == len(set(DATASETS)) == 9
