"""MobileNet with blocks that suit binary convolutions (after Howard et al., arXiv 1704.04861)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fqt_jax.models.common import Blocks, avg_pooling, scaled
from fqt_jax.sequential import Sequential

_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *[(512, 1)] * 5,
    *((1024, 2), (1024, 1)),
)
"""Channels after, and stride of, each block."""


class MobileNet(Blocks):
    """Depthwise 3x3 and pointwise 1x1 convolutions in turn, each with a shortcut of its own.

    Each convolution sees normalized input, a PReLU follows it, and what it saw is added: average
    pooled where it has a stride, and twice over, side by side, where it doubles the channels
    (as in ReActNet, arXiv 2003.03488). So real values pass every sign, at no parameters.

    Args:
      num_classes: size of the output.
      in_features: channels of the images.
      width: factor on the number of channels; 32, 64, ..., 1024 at 1.
      stem: ``"small"``, of stride 1, for images of 32x32 and the like, or ``"imagenet"``, of
        stride 2.
      rngs: the stream ``params``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from fqt_jax.models import MobileNet
      >>> def logits(x):
      ...     return MobileNet(num_classes=10, width=0.25, rngs=nnx.Rngs(0))(x)
      >>> jax.eval_shape(logits, jnp.zeros((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_features: int = 3,
        width: float = 1.0,
        stem: str = "small",
        rngs: nnx.Rngs,
    ):
        if stem not in ("small", "imagenet"):
            raise ValueError(f"stem must be 'small' or 'imagenet'; got {stem!r}.")
        channels = scaled(32, width)
        stride = 1 if stem == "small" else 2
        self.stem = Sequential(
            nnx.Conv(in_features, channels, (3, 3), stride, padding=1, use_bias=False, rngs=rngs),
            nnx.BatchNorm(channels, momentum=0.9, rngs=rngs),
            nnx.PReLU(0.25),
        )
        self.blocks = nnx.List()
        for features, block_stride in _BLOCKS:
            out_features = scaled(features, width)
            self.blocks.append(_Block(channels, out_features, block_stride, rngs=rngs))
            channels = out_features
        self.head = nnx.Linear(channels, num_classes, rngs=rngs)


class _Block(nnx.Module):
    def __init__(self, in_features: int, out_features: int, stride: int, *, rngs: nnx.Rngs):
        def layers(features: int, size: int, strides: int, groups: int) -> list[Any]:
            conv = nnx.Conv(
                in_features,
                features,
                (size, size),
                strides,
                padding=size // 2,
                feature_group_count=groups,
                use_bias=False,
                rngs=rngs,
            )
            norm = nnx.BatchNorm(in_features, momentum=0.9, rngs=rngs)
            return [norm, conv, nnx.PReLU(0.25)]

        self.depthwise = Sequential(*layers(in_features, 3, stride, in_features))
        self.pool = avg_pooling(stride) if stride > 1 else None
        self.pointwise = Sequential(*layers(out_features, 1, 1, 1))
        self.copies = -(-out_features // in_features)
        self.out_features = out_features

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.depthwise(x, residual=x if self.pool is None else self.pool(x))
        # Widths that are rounded may not be double: the last copy is cut.
        residual = jnp.tile(x, self.copies)[..., : self.out_features]
        return self.pointwise(x, residual=residual)
