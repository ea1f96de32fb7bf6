"""Blocks of a Transformer that suit binary products (after Vaswani et al., arXiv 1706.03762)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from fqt_jax.attention import self_attention
from fqt_jax.sequential import Sequential

HEAD_FEATURES = 32
"""The most features of an attention head."""


class Block(nnx.Module):
    """Attention and a feed-forward layer, each with a norm in front and a shortcut past it.

    Each of the four products sees normalized input, which centres its signs: those of queries,
    keys and values, and the first of the feed-forward layer, as in any block with norms in front;
    the attention's output and the feed-forward layer's second by norms of their own. So each stands
    in a sequence behind its norm.

    Args:
      features: width, an even number; heads have at most 32 each.
      causal: whether a position sees only those before it and itself.
      rotary: whether queries and keys are turned by their position
        (RoPE, arXiv 2104.09864).
      rngs: the stream ``params``.
    """

    def __init__(
        self, features: int, *, causal: bool = False, rotary: bool = False, rngs: nnx.Rngs
    ):
        self.attention = Attention(features, causal=causal, rotary=rotary, rngs=rngs)
        self.feed_forward = Sequential(
            nnx.LayerNorm(features, rngs=rngs),
            nnx.Linear(features, 4 * features, rngs=rngs),
            nnx.PReLU(0.25),
            nnx.LayerNorm(4 * features, rngs=rngs),
            nnx.Linear(4 * features, features, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[N, T, C]`` to ``[N, T, C]``."""
        x = self.attention(x)
        return self.feed_forward(x, residual=x)


class Attention(nnx.Module):
    """Self-attention of several heads, with norms before both products and a shortcut past it.

    Args:
      features, causal, rotary, rngs: as for :class:`Block`.

    Raises:
      ValueError: the number of features is odd.
    """

    def __init__(
        self, features: int, *, causal: bool = False, rotary: bool = False, rngs: nnx.Rngs
    ):
        self.heads = head_count(features)
        self.causal, self.rotary = causal, rotary
        self.qkv = Sequential(
            nnx.LayerNorm(features, rngs=rngs), nnx.Linear(features, 3 * features, rngs=rngs)
        )
        self.out = Sequential(
            nnx.LayerNorm(features, rngs=rngs), nnx.Linear(features, features, rngs=rngs)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[N, T, C]`` to ``[N, T, C]``."""
        n, length, features = x.shape
        heads = self.qkv(x).reshape(n, length, 3, self.heads, features // self.heads)
        if self.rotary:
            q, k, v = heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]
            heads = jnp.stack([turned(q), turned(k), v], axis=2)
        y = self_attention(heads, is_causal=self.causal)
        return self.out(y.reshape(x.shape), residual=x)


def head_count(features: int) -> int:
    """The fewest heads of an even number of features each, and of :data:`HEAD_FEATURES` at most.

    Raises:
      ValueError: the number of features is odd.

    Example:
      >>> head_count(128), head_count(100)
      (4, 5)
    """
    if features % 2:
        raise ValueError(f"the features of a block must be even; got {features}.")
    least = -(-features // HEAD_FEATURES)
    return next(n for n in range(least, features) if features % (2 * n) == 0)


def turned(x: jax.Array) -> jax.Array:
    r"""Rotary positions: the pair ``(i, i + D/2)`` of position ``t`` is turned by an angle.

    .. math:: t \cdot 10000^{-2i/D}

    Args:
      x: ``[N, T, heads, D]``, with even ``D``.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.broadcast_to(jnp.array([1.0, 0.0]), (1, 2, 1, 2))
      >>> [f"{a:.3f}" for a in turned(x)[0, 1, 0]]  # by one radian
      ['0.540', '0.841']
    """
    half = x.shape[-1] // 2
    rates = jnp.power(10000.0, -jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.outer(jnp.arange(x.shape[1], dtype=jnp.float32), rates)[None, :, None, :]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
