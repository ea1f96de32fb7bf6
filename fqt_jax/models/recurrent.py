"""Recurrent networks that read images row by row, with cells that suit binary products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fqt_jax.models.common import scaled

Carry = tuple[jax.Array, jax.Array]


class RecurrentNet(nnx.Module):
    """Layers of recurrent cells over the rows of an image, a shortcut past each, and a mean.

    A layer multiplies its normalized input, for all rows at once, and its normalized state, row by
    row. The latter is what a cell remembers in float besides: the memory of an LSTM, the state that
    a GRU keeps.

    Args:
      cell: :func:`lstm_step` or :func:`gru_step`.
      gates: how many products a unit of that cell has.
      depth: number of layers.
      features: units of a layer at width 1.
      num_classes: size of the output.
      in_features: channels of the images.
      image_size: height and width of the images. They may be of any height.
      width: factor on the units.
      rngs: the stream ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from fqt_jax.models import GRU
      >>> model = GRU(num_classes=10, image_size=(8, 8), width=0.125, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 8, 8, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        cell: Callable[[jax.Array, jax.Array, Carry], Carry],
        gates: int,
        depth: int = 2,
        features: int = 512,
        *,
        num_classes: int,
        in_features: int = 3,
        image_size: tuple[int, int] = (32, 32),
        width: float = 1.0,
        rngs: nnx.Rngs,
    ):
        features = scaled(features, width)
        self.columns = image_size[1]
        self.stem = nnx.Linear(image_size[1] * in_features, features, rngs=rngs)
        self.layers = nnx.List(_Layer(cell, gates, features, rngs=rngs) for _ in range(depth))
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.head = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``[N, H, W, C]`` to logits ``[N, num_classes]``."""
        if x.shape[2] != self.columns:
            raise ValueError(f"images must be {self.columns} pixels wide; got {x.shape[2]}.")
        x = self.stem(x.reshape(*x.shape[:2], -1))
        for layer in self.layers:
            x = x + layer(x)
        return self.head(jnp.mean(self.norm(x), axis=1))


class _Layer(nnx.Module):
    def __init__(self, cell: Any, gates: int, features: int, *, rngs: nnx.Rngs):
        self.cell = cell
        self.input_norm = nnx.LayerNorm(features, rngs=rngs)
        self.input = nnx.Linear(features, gates * features, rngs=rngs)
        self.state_norm = nnx.LayerNorm(features, rngs=rngs)
        self.state = nnx.Linear(features, gates * features, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[N, T, C]`` to ``[N, T, C]``."""
        given = self.input(self.input_norm(x))

        def step(layer: _Layer, carry: Carry, given: jax.Array) -> tuple[Carry, jax.Array]:
            product = layer.state(layer.state_norm(carry[0]))
            carry = layer.cell(given, product, carry)
            return carry, carry[0]

        # Parameters are the same in each step; the random streams go on.
        axes = nnx.StateAxes({nnx.Param: None, ...: nnx.Carry})
        scan = nnx.scan(step, in_axes=(axes, nnx.Carry, 1), out_axes=(nnx.Carry, 1))
        zero = jnp.zeros_like(x[:, 0])
        y: jax.Array = scan(self, (zero, zero), given)[1]
        return y


def lstm_step(given: jax.Array, product: jax.Array, carry: Carry) -> Carry:
    r"""A step of an LSTM (Hochreiter and Schmidhuber, 1997), whose forget gate begins open.

    .. math:: c' = \sigma(f + 1)\, c + \sigma(i) \tanh(g), \qquad h' = \sigma(o) \tanh(c')

    Args:
      given, product: ``[N, 4 C]``, whose sum are the gates ``i, f, g, o``.
      carry: ``(h, c)``, ``[N, C]`` each.
    """
    i, f, g, o = jnp.split(given + product, 4, axis=-1)
    c = nnx.sigmoid(f + 1) * carry[1] + nnx.sigmoid(i) * jnp.tanh(g)
    return nnx.sigmoid(o) * jnp.tanh(c), c


def gru_step(given: jax.Array, product: jax.Array, carry: Carry) -> Carry:
    r"""A step of a GRU (Cho et al., arXiv 1406.1078; the reset after the product).

    .. math:: h' = (1 - \sigma(z)) \tanh(n_x + \sigma(r)\, n_h) + \sigma(z)\, h

    Args:
      given, product: ``[N, 3 C]``: parts of ``r`` and ``z``, which are summed, and of ``n``.
      carry: ``(h, _)``, ``[N, C]``; the second is not used.
    """
    r_x, z_x, n_x = jnp.split(given, 3, axis=-1)
    r_h, z_h, n_h = jnp.split(product, 3, axis=-1)
    z = nnx.sigmoid(z_x + z_h)
    h = (1 - z) * jnp.tanh(n_x + nnx.sigmoid(r_x + r_h) * n_h) + z * carry[0]
    return h, carry[1]


LSTM = functools.partial(RecurrentNet, lstm_step, 4)
GRU = functools.partial(RecurrentNet, gru_step, 3)
