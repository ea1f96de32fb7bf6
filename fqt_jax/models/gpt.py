"""A Transformer that continues text (after Radford et al., GPT-2), in a binary-friendly form."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fqt_jax.models.common import scaled
from fqt_jax.models.transformer import Block

_POSITION_INIT = nnx.initializers.normal(0.02)


class GPT(nnx.Module):
    """A decoder alone: each position sees those before it, and predicts the token after it.

    Embeddings, norms, softmax and the head are what stays in float once the model is quantized;
    the four products of each block (:class:`fqt_jax.models.transformer.Block`) become binary. Tell
    :func:`fqt_jax.quantize` an ``example`` of tokens: without, it takes the first product for a
    first layer, and keeps it in float.

    Args:
      depth: number of blocks.
      features: width of the blocks at width 1.
      num_classes: number of tokens.
      length: the most positions, for learned ones.
      positions: ``"learned"``, a vector for each, or ``"rotary"``
        (:func:`fqt_jax.models.transformer.turned`).
      tied: whether the head is the embedding once more, transposed.
      width: factor on the features.
      rngs: the stream ``params``.

    Raises:
      ValueError: ``positions`` is none of these, or the number of features odd.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> from fqt_jax.models import GPT
      >>> model = GPT(1, 16, num_classes=50, length=8, rngs=nnx.Rngs(0))
      >>> tokens = jnp.zeros((2, 8), jnp.int32)
      >>> model(tokens).shape
      (2, 8, 50)
      >>> for layer in fqt.quantize(model, fqt.QAT, example=tokens).table:
      ...     print(layer.path, layer.recipe.binary)
      blocks/0/attention/qkv/layers/1 True
      blocks/0/attention/out/layers/1 True
      blocks/0/feed_forward/layers/1 True
      blocks/0/feed_forward/layers/4 True
      head False
    """

    def __init__(
        self,
        depth: int,
        features: int,
        *,
        num_classes: int,
        length: int = 128,
        positions: Literal["learned", "rotary"] = "learned",
        tied: bool = False,
        width: float = 1.0,
        rngs: nnx.Rngs,
    ):
        if positions not in ("learned", "rotary"):
            raise ValueError(f"positions must be 'learned' or 'rotary'; got {positions!r}.")
        features = scaled(features, width)
        self.embedding = nnx.Embed(num_classes, features, rngs=rngs)
        rotary = positions == "rotary"
        self.positions = (
            None if rotary else nnx.Param(_POSITION_INIT(rngs.params(), (length, features)))
        )
        self.blocks = nnx.List(
            Block(features, causal=True, rotary=rotary, rngs=rngs) for _ in range(depth)
        )
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.head = None if tied else nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens ``int[N, T]`` to logits ``[N, T, num_classes]`` of the tokens after each.

        Raises:
          ValueError: there are more positions than were learned.
        """
        x = self.embedding(tokens)
        if self.positions is not None:
            length, most = tokens.shape[1], self.positions.shape[0]
            if length > most:
                raise ValueError(f"the model has {most} positions; got a sequence of {length}.")
            x = x + self.positions[...][None, :length]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.head is None:
            return self.embedding.attend(x) / jnp.sqrt(x.shape[-1]).astype(x.dtype)
        return self.head(x)


GPTSmall = functools.partial(GPT, 4, 512)
"""Four blocks."""
