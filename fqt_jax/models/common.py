"""Pieces that the models share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fqt_jax.sequential import Sequential

STEM_POOL = functools.partial(
    nnx.max_pool, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1))
)
"""What follows the first convolution of a ResNet for large images."""


def scaled(channels: int, width: float) -> int:
    """Number of channels at a width factor: at least 8, and a multiple of 8 unless ``width`` is 1.

    Raises:
      ValueError: ``width`` is not positive.
    """
    if not width > 0:
        raise ValueError(f"width must be positive; got {width}.")
    return channels if width == 1 else max(8, 8 * round(channels * width / 8))


def avg_pool(x: jax.Array, size: int) -> jax.Array:
    """Average over windows of ``size x size`` that do not overlap, smaller at the far edges."""
    n, h, w, c = x.shape
    if h % size == 0 and w % size == 0:
        # A reshape and a mean, whose gradient costs far less on CPUs than that of a window.
        return jnp.mean(x.reshape(n, h // size, size, w // size, size, c), axis=(2, 4))
    return nnx.avg_pool(x, (size, size), (size, size), padding="SAME", count_include_pad=False)


@functools.cache
def max_pooling(size: int) -> Callable[[jax.Array], jax.Array]:
    """Max-pooling over windows that do not overlap, the same object each time.

    The structures of two models are equal, and share what was compiled, only if the functions in
    them are.
    """
    return functools.partial(nnx.max_pool, window_shape=(size, size), strides=(size, size))


@functools.cache
def avg_pooling(size: int) -> Callable[[jax.Array], jax.Array]:
    """:func:`avg_pool`, the same object each time."""
    return functools.partial(avg_pool, size=size)


class Blocks(nnx.Module):
    """A network of a stem, blocks one after the other, a mean over the positions, and a head."""

    stem: Sequential
    blocks: nnx.List[Any]
    head: nnx.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``[N, H, W, C]`` to logits ``[N, num_classes]``."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))
