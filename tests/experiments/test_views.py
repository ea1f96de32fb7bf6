"""What is seen of an image: against Pillow by hand, and by where its colours come from."""

import io

import numpy as np
import pytest
from PIL import Image

from experiments.data.views import central, random_box, random_view, random_words


def gradient(height: int, width: int) -> np.ndarray:
    """Red tells the row and green the column."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    red, green = 255 * rows / height, 255 * columns / width
    return np.stack([red, green, 0 * rows + 128], -1).astype(np.uint8)


def photo(height=375, width=500, seed=0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def file_of(image: Image.Image, file_format: str, **options) -> Image.Image:
    """An image as it is opened from a file, not yet loaded."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return Image.open(buffer)


@pytest.mark.parametrize(
    ("height", "width", "scaled", "box"),
    [
        (375, 500, (341, 256), (58, 16, 282, 240)),
        (500, 375, (256, 341), (16, 58, 240, 282)),
        (100, 100, (256, 256), (16, 16, 240, 240)),
        (256, 1000, (1000, 256), (388, 16, 612, 240)),
    ],
)
def test_the_central_view_is_that_of_pillow_by_hand(height, width, scaled, box):
    image = photo(height, width)
    expected = image.resize(scaled, Image.Resampling.BILINEAR).crop(box)
    np.testing.assert_array_equal(central(image, (224, 224)), np.asarray(expected))


def test_the_central_view_of_another_shape_covers_it():
    image = Image.fromarray(gradient(100, 400))
    view = central(image, (112, 224)).astype(int)
    assert view.shape == (112, 224, 3)
    assert np.abs(view[:, 0, 1] + view[:, -1, 1] - 255).max() <= 4  # in the middle
    assert view[-1, 0, 0] - view[0, 0, 0] == pytest.approx(255 * 224 / 256, abs=5)


def test_random_boxes_have_the_sizes_of_torchvision():
    boxes = np.array([random_box(500, 375, random_words(0, 0, i)) for i in range(4000)])
    left, top, w, h = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + w).max() == 500
    assert (top + h).max() == 375
    area, ratio = w * h / (500 * 375), np.log(w / h)
    assert 0.079 < area.min() < 0.09
    assert 0.9 < area.max() <= 1
    assert np.exp(ratio.min()) == pytest.approx(3 / 4, abs=0.01)
    assert np.exp(ratio.max()) == pytest.approx(4 / 3, abs=0.01)
    small = area < 0.5  # these always fit, so that both are uniform
    assert area[small].mean() == pytest.approx(0.29, abs=0.01)
    assert ratio[small].mean() == pytest.approx(0, abs=0.02)
    assert (left / (500 - w))[w < 250].mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(1000, 10, (493, 0, 13, 10)), (10, 1000, (0, 493, 10, 13)), (1, 1, (0, 0, 1, 1))],
)
def test_where_no_draw_fits_it_is_the_middle(width, height, box):
    assert random_box(width, height, np.full(41, 0.999)) == box


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_random_view_shows_its_box(mirrored):
    words = random_words(0, 0, 5)
    words[-1] = 0.4 if mirrored else 0.6
    left, top, w, h = random_box(500, 375, words)
    image = Image.fromarray(gradient(375, 500))
    view = random_view(image, (64, 64), words=words, flip=True).astype(float)
    view = view[:, ::-1] if mirrored else view
    assert view[0, :, 0].mean() == pytest.approx(255 * top / 375, abs=4)
    assert view[-1, :, 0].mean() == pytest.approx(255 * (top + h) / 375, abs=4)
    assert view[:, 0, 1].mean() == pytest.approx(255 * left / 500, abs=4)
    assert view[:, -1, 1].mean() == pytest.approx(255 * (left + w) / 500, abs=4)
    unflipped = random_view(image, (64, 64), words=words, flip=False)
    np.testing.assert_array_equal(unflipped, view)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_taken_on_its_side_is_seen_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = photo()
    stored = upright.transpose(back[orientation]) if orientation > 1 else upright
    words = random_words(0, 0, 3)
    views = [
        random_view(file_of(image, "PNG", **options), (48, 48), words=words, flip=True)
        for image, options in ((upright, {}), (stored, {"exif": exif}))
    ]
    np.testing.assert_array_equal(*views)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(monkeypatch):
    sizes = []
    resize = Image.Image.resize

    def recorded(image, *args, **kwargs):
        sizes.append(image.size)
        return resize(image, *args, **kwargs)

    large = photo(1500, 2000)
    files = file_of(large, "JPEG", quality=95, subsampling=0), file_of(large, "PNG")
    monkeypatch.setattr(Image.Image, "resize", recorded)
    words = np.full(41, 0.5)
    jpeg, png = (random_view(file, (64, 64), words=words, flip=False) for file in files)
    assert sizes == [(250, 188), (2000, 1500)]
    assert np.abs(jpeg.astype(int) - png).max() <= 6


def test_random_numbers_belong_to_seed_epoch_and_example():
    same = random_words(1, 2, 3)
    np.testing.assert_array_equal(random_words(1, 2, 3), same)
    assert same.shape == (41,)
    assert ((same >= 0) & (same < 1)).all()
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert (random_words(*other) != same).all()
