"""Random flips and crops, and normalization, on the device that trains."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnames=("flip", "pad"))
def augment(images: jax.Array, key: jax.Array, *, flip: bool, pad: int) -> jax.Array:
    """Mirrors and shifts each image at random.

    Each image is surrounded by ``pad`` zeros on every side and cut back to its size at one of the
    ``(2 pad + 1)^2`` positions; with ``flip`` it is mirrored left to right with probability 1/2.

    Args:
      images: any real type, ``[N, H, W, C]``. Give uint8, before ``normalize``: it moves a
        quarter of the bytes, and the border is then black.
      key: a JAX key; the same key gives the same images.
      flip: whether to mirror.
      pad: border in pixels, not negative. Static, as is ``flip``.

    Returns:
      Images of the same shape and type.

    Raises:
      ValueError: ``images`` has not four axes, or ``pad`` is negative.

    Example:
      >>> images = jnp.arange(2 * 8 * 8 * 3, dtype=jnp.uint8).reshape(2, 8, 8, 3)
      >>> out = augment(images, jax.random.key(0), flip=True, pad=2)
      >>> out.shape, out.dtype
      ((2, 8, 8, 3), dtype('uint8'))
      >>> bool((augment(images, jax.random.key(0), flip=False, pad=0) == images).all())
      True
    """
    if images.ndim != 4:
        raise ValueError(f"images must be [N, H, W, C]; got {list(images.shape)}.")
    if pad < 0:
        raise ValueError(f"pad must not be negative; got {pad}.")
    flip_key, crop_key = jax.random.split(key)
    count = images.shape[0]
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(count, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    if pad:
        offsets = jax.random.randint(crop_key, (count, 2), 0, 2 * pad + 1)
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        size = images.shape[1:]

        def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), size)

        images = jax.vmap(crop)(padded, offsets)
    return images


@jax.jit
def normalize(
    images: jax.Array | np.ndarray, mean: np.ndarray | jax.Array, std: np.ndarray | jax.Array
) -> jax.Array:
    """``(images - mean) / std``, channel by channel.

    Args:
      images: uint8 ``[..., C]``.
      mean: float32 ``[C]``, on the scale 0 to 255 (``Dataset.mean``).
      std: float32 ``[C]``, positive (``Dataset.std``).

    Returns:
      float32 ``[..., C]``.

    Raises:
      ValueError: ``mean`` or ``std`` is not one number per channel.

    Example:
      >>> pixels = np.array([[0, 128], [255, 128]], np.uint8)
      >>> normalize(pixels, np.float32([127.5, 100]), np.float32([127.5, 14]))
      Array([[-1.,  2.],
             [ 1.,  2.]], dtype=float32)
    """
    channels = images.shape[-1:]
    for name, value in (("mean", mean), ("std", std)):
        if value.shape != channels:
            raise ValueError(f"{name} must be {list(channels)}; got {list(value.shape)}.")
    spread = (1,) * (images.ndim - 1) + channels
    floats = jnp.asarray(images).astype(jnp.float32)
    shift = jnp.asarray(mean, jnp.float32).reshape(spread)
    return (floats - shift) / jnp.asarray(std, jnp.float32).reshape(spread)
