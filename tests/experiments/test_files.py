"""A user's own images, in the forms that cameras and tools leave them."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from experiments.data import DataError, load

pytestmark = pytest.mark.usefixtures("own_folder")

HERE = pathlib.Path()


def gradient(height=12, width=18) -> np.ndarray:
    """Colours that tell where a pixel was, smooth enough for JPEG."""
    rows, columns = np.mgrid[:height, :width]
    red, green = 255 * rows / height, 255 * columns / width
    return np.stack([red, green, 128 + 0 * rows], -1).astype(np.uint8)


def jpeg(image: Image.Image, path: pathlib.Path, **options) -> None:
    image.save(path, "JPEG", quality=95, subsampling=0, **options)


def rotated(path: pathlib.Path) -> None:
    """As a camera writes a photograph that it took on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise
    jpeg(Image.fromarray(np.rot90(gradient(), 1)), path, exif=exif)


FORMS = {
    "photo.jpg": lambda path: jpeg(Image.fromarray(gradient()), path),
    "turned.JPG": rotated,
    "print.jpeg": lambda path: jpeg(Image.fromarray(gradient()).convert("CMYK"), path),
    "flat.png": lambda path: Image.fromarray(gradient()).save(path),
    "clear.png": lambda path: Image.fromarray(gradient()).convert("RGBA").save(path),
    "few.png": lambda path: Image.fromarray(gradient()).quantize(256).save(path),
    "small.webp": lambda path: Image.fromarray(gradient()).save(path, lossless=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_picture(form):
    folder_of({"a": [form], "b": [form]})
    image = load("folder", data_dir="photos", image_size=(12, 18)).train.images[0]
    assert image.shape == (12, 18, 3)
    assert np.abs(image.astype(int) - gradient()).max() <= (24 if form == "print.jpeg" else 10)


@pytest.mark.parametrize(("dtype", "scale"), [(np.uint8, 1), (np.uint16, 257)])
def test_grey_images_of_8_and_16_bits(dtype, scale):
    grey = gradient()[..., 0]
    folder_of({"a": ["flat.png"], "b": ["flat.png"]})
    for path in HERE.rglob("*.png"):
        Image.fromarray(grey.astype(dtype) * scale).save(path)
    image = load("folder", data_dir="photos", image_size=(12, 18)).train.images[0]
    np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, -1))


def folder_of(classes: dict[str, list[str]], root="photos", copies=10) -> pathlib.Path:
    """Classes of images, each image in slightly different copies."""
    for name, forms in classes.items():
        for form in forms:
            for copy in range(copies):
                path = HERE / root / name / f"{copy}-{form}"
                path.parent.mkdir(parents=True, exist_ok=True)
                FORMS[form](path)
    return HERE / root


def test_a_folder_is_split_by_content_and_its_classes_are_named():
    root = folder_of({"cat": ["flat.png"], "dog": ["flat.png"]}, copies=20)
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        Image.fromarray(gradient() // 2 + number).save(path)
    (root / "cat" / "notes.txt").write_text("left out")
    (root / "cat" / ".hidden.png").write_text("left out")
    (root / ".cache").mkdir()
    data = load("folder", data_dir=root, image_size=8, validation_fraction=0.25)
    assert (data.name, data.num_classes, data.class_names) == ("photos", 2, ("cat", "dog"))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [24, 8, 8]
    assert [np.bincount(p.labels).tolist() for p in (data.train, data.test)] == [[12, 12], [4, 4]]
    (root / "cat" / "0-flat.png").rename(root / "cat" / "zzz.png")  # names do not count
    again = load("folder", data_dir=root, image_size=8, validation_fraction=0.25)
    assert {image.tobytes() for image in again.test.images} == {
        image.tobytes() for image in data.test.images
    }


@pytest.mark.parametrize(
    ("splits", "counts"), [(("train", "val", "test"), (10, 10, 10)), (("train", "val"), (8, 2, 10))]
)
def test_folders_for_the_splits(splits, counts):
    for split in splits:
        folder_of({"a": ["flat.png"], "b": ["flat.png"]}, f"photos/{split}", copies=5)
    options = {"data_dir": "photos", "image_size": 8}
    if "test" in splits:
        with pytest.raises(DataError, match="validation_fraction has no effect: photos has valid"):
            load("folder", **options, validation_fraction=0.2)
    else:
        options["validation_fraction"] = 0.2
    data = load("folder", **options)
    assert tuple(len(part) for part in (data.train, data.validation, data.test)) == counts


def truncated(root):
    path = root / "a" / "0-photo.jpg"
    path.write_bytes(path.read_bytes()[:-20])


def other_classes(root):
    for split in ("train", "test"):
        folder_of({"a": ["flat.png"], "b": ["flat.png"]}, f"photos/{split}")
    (root / "test" / "b").rename(root / "test" / "c")
    for name in ("a", "b"):
        for path in (root / name).iterdir():
            path.unlink()
        (root / name).rmdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncated, "a/0-photo.jpg: not a readable image: image file is truncated"),
        (
            lambda root: (root / "a" / "x.png").write_text("text"),
            "x.png: not a readable image: can",
        ),
        (lambda root: (root / "empty").mkdir(), r"empty holds no image \(.jpg, .jpeg, "),
        (other_classes, "test has other classes than the training images: b, c"),
    ],
)
def test_a_bad_folder_is_named(spoil, message):
    spoil(folder_of({"a": ["photo.jpg"], "b": ["photo.jpg"]}))
    with pytest.raises(DataError, match=message):
        load("folder", data_dir="photos", image_size=8)


@pytest.mark.parametrize(
    ("name", "data_dir", "message"),
    [
        ("folder", None, "the data set 'folder' needs a data_dir: the folder of images"),
        ("npz", None, "the data set 'npz' needs a data_dir: the .npz file"),
        ("folder", "nowhere", "nowhere is not there"),
        ("folder", "file", "file is no folder"),
        ("folder", ".", "must have a folder for each class, two or more; it has only one"),
        ("npz", "nowhere.npz", "nowhere.npz is not there"),
        ("npz", "file", "file is no .npz file: it is no archive"),
        ("digits", ".", "digits comes with Python packages: it takes no data_dir"),
        ("food", ".", "unknown data set 'food'; known: mnist5k, .* prepared in .: nothing"),
    ],
)
def test_a_bad_place_is_named(name, data_dir, message):
    pathlib.Path("file").write_text("text")
    pathlib.Path("one").mkdir()
    with pytest.raises(DataError, match=message):
        load(name, data_dir=data_dir)


IMAGES = np.arange(40 * 6 * 5, dtype=np.uint32).reshape(40, 6, 5).astype(np.uint8)
LABELS = np.arange(40) % 4


def test_arrays_in_one_file():
    np.savez("mine.npz", images=IMAGES, labels=LABELS)
    data = load("npz", data_dir="mine.npz", validation_fraction=0.25)
    assert (data.name, data.image_size, data.channels, data.num_classes) == ("mine", (6, 5), 1, 4)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [24, 8, 8]
    together = [*data.train.images, *data.validation.images, *data.test.images]
    assert sorted(image.tobytes() for image in together) == sorted(i.tobytes() for i in IMAGES)
    assert load("npz", data_dir="mine.npz", image_size=4).image_size == (4, 4)


def test_arrays_of_the_splits_in_colour():
    colour = np.repeat(IMAGES[..., None], 3, -1)
    arrays = {f"{split}_images": colour for split in ("train", "val", "test")}
    np.savez("mine.npz", **arrays, **{f"{s}_labels": LABELS for s in ("train", "val", "test")})
    data = load("npz", data_dir="mine.npz")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [40, 40, 40]
    assert data.channels == 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "mine.npz has no array labels"),
        ({"pictures": IMAGES}, "must hold images and labels, or .*; it holds pictures"),
        ({"images": IMAGES.astype(float), "labels": LABELS}, r"images must be uint8 .* is float64"),
        ({"images": IMAGES, "labels": LABELS[:3]}, "labels must be 40 integers; it is int64"),
        ({"images": IMAGES, "labels": LABELS - 1}, "from 0; they reach from -1 to 2"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "images is empty"),
        ({"images": IMAGES, "labels": np.array([None] * 40)}, "cannot be read as an .npz file"),
    ],
)
def test_bad_arrays_are_named(arrays, message):
    np.savez("mine.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load("npz", data_dir="mine.npz")


def test_more_than_the_machine_holds_is_refused_at_once():
    with pytest.raises(DataError, match=r"images of 99999x99999 take .* GiB, and this machine has"):
        load("digits", image_size=99999)


def test_what_pillow_says_is_one_line():
    buffer = io.BytesIO()
    Image.fromarray(gradient()).save(buffer, "PNG")
    root = folder_of({"a": ["flat.png"], "b": ["flat.png"]})
    (root / "a" / "0-flat.png").write_bytes(buffer.getvalue()[:60])
    with pytest.raises(DataError) as error:
        load("folder", data_dir=root, image_size=8)
    assert "\n" not in str(error.value)
