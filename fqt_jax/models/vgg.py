"""VGG with batch norm, PReLU and a pooled head (Simonyan and Zisserman, arXiv 1409.1556)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fqt_jax.models.common import max_pooling, scaled
from fqt_jax.sequential import Sequential


class VGG(nnx.Module):
    """Stages of 3x3 convolutions, each with batch norm and PReLU; a 2x2 max-pool ends a stage.

    The head averages over all positions and is one dense layer, so any image size works from
    ``2 ** len(stages)`` on.

    Args:
      stages: the number of channels of each convolution, stage by stage.
      num_classes: size of the output.
      in_features: channels of the images.
      width: factor on the number of channels.
      rngs: the stream ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from fqt_jax.models import VGG
      >>> model = VGG(((8,), (16, 16)), num_classes=10, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 8, 8, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        *,
        num_classes: int,
        in_features: int = 3,
        width: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.smallest = 2 ** len(stages)
        layers: list[Any] = []
        for stage in stages:
            for channels in stage:
                features = scaled(channels, width)
                layers += [
                    nnx.Conv(in_features, features, (3, 3), use_bias=False, rngs=rngs),
                    nnx.BatchNorm(features, momentum=0.9, rngs=rngs),
                    nnx.PReLU(0.25),
                ]
                in_features = features
            layers.append(max_pooling(2))
        self.features = Sequential(*layers)
        self.head = nnx.Linear(in_features, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``[N, H, W, C]`` to logits ``[N, num_classes]``."""
        if min(x.shape[1:3]) < self.smallest:
            raise ValueError(
                f"images must be at least {self.smallest}x{self.smallest}; "
                f"got {x.shape[1]}x{x.shape[2]}."
            )
        return self.head(jnp.mean(self.features(x), axis=(1, 2)))


VGGSmall = functools.partial(VGG, ((32, 32), (64, 64), (128, 128)))
"""Six convolutions, for images of 16x16 and the like."""
VGG11 = functools.partial(VGG, ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2))
VGG13 = functools.partial(VGG, ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2))
VGG16 = functools.partial(VGG, ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3))
VGG19 = functools.partial(VGG, ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4))
