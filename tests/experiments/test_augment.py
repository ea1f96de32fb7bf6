"""Random flips and crops, normalization, and the order of batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import DataError, epoch_order
from experiments.data.augment import augment, normalize


def images_of(n: int, height: int, width: int, channels: int, seed: int, dtype) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 256, (n, height, width, channels)).astype(dtype)


@given(
    n=st.sampled_from([1, 3]),
    shape=st.sampled_from([(4, 4, 1), (3, 5, 3)]),
    dtype=st.sampled_from([np.uint8, np.float32]),
    flip=st.booleans(),
    pad=st.sampled_from([0, 2]),
    seed=st.integers(0, 1000),
)
def test_each_image_is_a_crop_of_itself_or_of_its_mirror(n, shape, dtype, flip, pad, seed):
    images = images_of(n, *shape, seed, dtype)
    key = jax.random.key(seed)
    out = np.asarray(augment(jnp.asarray(images), key, flip=flip, pad=pad))
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    height, width = images.shape[1:3]
    for before, after in zip(images, out, strict=True):
        candidates = [
            np.pad(image, ((pad, pad), (pad, pad), (0, 0)))[y : y + height, x : x + width]
            for image in ([before, before[:, ::-1]] if flip else [before])
            for y in range(2 * pad + 1)
            for x in range(2 * pad + 1)
        ]
        assert any(np.array_equal(after, candidate) for candidate in candidates)


def test_nothing_asked_for_is_the_identity():
    images = images_of(5, 6, 6, 3, 0, np.uint8)
    out = augment(jnp.asarray(images), jax.random.key(1), flip=False, pad=0)
    np.testing.assert_array_equal(out, images)


def test_one_key_gives_one_result_whether_jitted_or_not():
    images = jnp.asarray(images_of(16, 8, 8, 3, 0, np.uint8))
    first = augment(images, jax.random.key(1), flip=True, pad=2)
    np.testing.assert_array_equal(first, augment(images, jax.random.key(1), flip=True, pad=2))
    with jax.disable_jit():
        eager = augment(images, jax.random.key(1), flip=True, pad=2)
    np.testing.assert_array_equal(first, eager)
    other = augment(images, jax.random.key(2), flip=True, pad=2)
    assert not np.array_equal(first, other)


def test_flips_and_positions_are_uniform():
    n, pad = 9000, 1
    image = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3, 1)
    out = np.asarray(
        augment(jnp.asarray(np.repeat(image, n, 0)), jax.random.key(0), flip=True, pad=pad)
    )
    _, counts = np.unique(out.reshape(n, -1), axis=0, return_counts=True)
    assert len(counts) == 2 * 9  # each of nine positions, of the image and of its mirror
    assert np.all(np.abs(counts - n / 18) < 5 * np.sqrt(n / 18))


def test_augment_rejects_wrong_input():
    with pytest.raises(ValueError, match=r"images must be \[N, H, W, C\]; got \[4, 4, 3\]"):
        augment(jnp.zeros((4, 4, 3)), jax.random.key(0), flip=True, pad=0)
    with pytest.raises(ValueError, match="pad must not be negative; got -1"):
        augment(jnp.zeros((1, 4, 4, 3)), jax.random.key(0), flip=True, pad=-1)


def test_normalize():
    images = images_of(50, 4, 4, 3, 0, np.uint8)
    mean = images.mean((0, 1, 2)).astype(np.float32)
    std = images.std((0, 1, 2)).astype(np.float32)
    out = normalize(images, mean, std)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out.mean((0, 1, 2)), np.zeros(3), atol=1e-5)
    np.testing.assert_allclose(out.std((0, 1, 2)), np.ones(3), atol=1e-5)
    with pytest.raises(ValueError, match=r"std must be \[3\]; got \[1\]"):
        normalize(images, mean, std[:1])


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 2**40), st.integers(0, 500))
def test_epoch_order_takes_distinct_examples(n, batch_size, seed, epoch):
    if batch_size > n:
        with pytest.raises(DataError, match="batch_size must lie between 1 and"):
            epoch_order(n, batch_size, seed, epoch)
        return
    order = epoch_order(n, batch_size, seed, epoch)
    assert order.dtype == np.int32
    assert order.shape == (n // batch_size, batch_size)
    assert len(np.unique(order)) == order.size
    assert order.min() >= 0
    assert order.max() < n
    np.testing.assert_array_equal(order, epoch_order(n, batch_size, seed, epoch))


def test_batches_are_laid_out_by_label_and_otherwise_the_same():
    labels = np.arange(50) * 7 % 4
    pieces = epoch_order(50, 12, seed=3, epoch=1, labels=labels, pieces=4).reshape(-1, 4, 3)
    assert (np.diff(labels[pieces], axis=2) >= 0).all()
    plain = epoch_order(50, 12, seed=3, epoch=1)
    np.testing.assert_array_equal(np.sort(pieces.reshape(-1, 12)), np.sort(plain))
    counts = [[np.bincount(labels[piece], minlength=9) for piece in batch] for batch in pieces]
    assert np.ptp(counts, axis=1).max() <= 1  # of every label, each has its share
    laid_out = epoch_order(50, 12, seed=3, epoch=1, labels=labels)
    assert laid_out.dtype == np.int32
    for before, after in zip(plain, laid_out, strict=True):
        expected = sorted(before, key=lambda i: labels[i])  # stable
        np.testing.assert_array_equal(after, expected)
        assert not np.array_equal(after, before)
    with pytest.raises(DataError, match=r"labels must have the shape \(50,\); got \(49,\)"):
        epoch_order(50, 12, seed=3, epoch=1, labels=labels[:49])


def test_epoch_order_depends_on_seed_and_epoch_only():
    orders = {epoch_order(100, 10, s, e).tobytes() for s in range(5) for e in range(5)}
    assert len(orders) == 25
    # The permutation does not depend on how it is cut into batches.
    np.testing.assert_array_equal(
        epoch_order(100, 10, 1, 2).ravel(), epoch_order(100, 25, 1, 2).ravel()
    )
    # Fixed for good: a resumed run, on any machine, must see these.
    assert epoch_order(8, 8, seed=0, epoch=0).tolist() == [[3, 2, 1, 6, 0, 7, 4, 5]]


@pytest.mark.parametrize(
    ("batch_size", "seed", "epoch"), [(0, 0, 0), (5, 0, 0), (1, -1, 0), (1, 0, -1)]
)
def test_epoch_order_rejects(batch_size, seed, epoch):
    with pytest.raises(DataError):
        epoch_order(4, batch_size, seed, epoch)
