"""Text that a model writes: tokens drawn one by one, each from what the model expects next."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def generate(
    model: Any,
    prompt: jax.Array,
    count: int,
    *,
    length: int,
    key: jax.Array | None = None,
    temperature: float = 1.0,
) -> jax.Array:
    r"""Continues sequences of tokens.

    Of the logits :math:`z` after the last token, the next token :math:`k` is drawn with

    .. math:: p_k \propto e^{z_k / \tau}

    at the temperature :math:`\tau`. The model sees the last ``length`` tokens. The model itself
    stays as it is.

    Args:
      model: an NNX module that maps tokens ``int[N, T]`` to logits ``[N, T, K]``, and looks at no
        later token: one in training, or the inference form of :mod:`fqt_jax.export`.
      prompt: ``int[N, P]``, with P at least 1.
      count: tokens to add.
      length: the positions that the model has.
      key: JAX random key; not needed at temperature 0.
      temperature: not negative; at 0 it is the most probable token.

    Returns:
      The new tokens, ``int32[N, count]``.

    Raises:
      ValueError: the prompt has no token or not two axes, a number is out of range, or tokens have
        to be drawn and there is no key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from fqt_jax.models import GPT
      >>> model = GPT(1, 16, num_classes=50, length=8, rngs=nnx.Rngs(0))
      >>> prompt = jnp.array([[3, 1, 4]])
      >>> generate(model, prompt, 20, length=8, key=jax.random.key(0)).shape
      (1, 20)
    """
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise ValueError(f"the prompt must be [N, P] with a token at least; got {prompt.shape}.")
    if count < 1 or length < 1:
        raise ValueError(f"count and length must be at least 1; got {count} and {length}.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number from 0 on; got {temperature}.")
    if key is None:
        if temperature > 0:
            raise ValueError("a key is needed at a temperature above 0.")
        key = jax.random.key(0)  # nothing is drawn with it
    graphdef, state = nnx.split(model)
    seen = jnp.asarray(prompt[:, -length:], jnp.int32)
    window = jnp.pad(seen, ((0, 0), (0, length - seen.shape[1])))
    filled = jnp.int32(seen.shape[1])
    return _generate(graphdef, state, window, filled, key, jnp.float32(temperature), count)


@functools.partial(jax.jit, static_argnames=("graphdef", "count"))
def _generate(
    graphdef: Any,
    state: Any,
    window: jax.Array,
    filled: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    count: int,
) -> jax.Array:
    length = window.shape[1]

    def add(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[Any, jax.Array]:
        window, filled = carry
        # What stands behind the last token has no part in its logits.
        logits = nnx.merge(graphdef, state, copy=True)(window)[:, filled - 1].astype(jnp.float32)
        drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        window = jnp.where(filled == length, jnp.roll(window, -1, axis=1), window)
        place = jnp.minimum(filled, length - 1)
        return (window.at[:, place].set(token), place + 1), token

    _, tokens = jax.lax.scan(add, (window, filled), jax.random.split(key, count))
    return tokens.T
