"""ResNet with a block that suits binary convolutions (after He et al., arXiv 1512.03385)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from fqt_jax.models.common import STEM_POOL, Blocks, avg_pooling, scaled
from fqt_jax.sequential import Sequential


class ResNet(Blocks):
    """Residual blocks in which each convolution sees normalized input and a PReLU follows it.

    A block computes ``prelu(conv(norm(.)))`` twice, or three times in a bottleneck, and adds the
    shortcut: the identity, or average pooling, a 1x1 convolution and a norm where the shape
    changes. Normalizing before the sign centres it, and the shortcut carries real values past it.

    Args:
      depths: number of blocks in each stage.
      bottleneck: whether a block is 1x1, 3x3, 1x1 with four times the channels at its end.
      num_classes: size of the output.
      in_features: channels of the images.
      width: factor on the number of channels; 64, 128, 256, 512 at 1.
      stem: ``"small"``, a 3x3 convolution, for images of 32x32 and the like, or ``"imagenet"``,
        a 7x7 convolution of stride 2 and a max-pool, for 224x224.
      rngs: the stream ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from fqt_jax.models import ResNet
      >>> model = ResNet((1, 1), num_classes=10, width=0.125, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 8, 8, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        bottleneck: bool = False,
        num_classes: int,
        in_features: int = 3,
        width: float = 1.0,
        stem: str = "small",
        rngs: nnx.Rngs,
    ):
        if stem not in ("small", "imagenet"):
            raise ValueError(f"stem must be 'small' or 'imagenet'; got {stem!r}.")
        self.depths = tuple(depths)
        channels = scaled(64, width)
        size, stride = (3, 1) if stem == "small" else (7, 2)
        layers: list[Any] = [
            nnx.Conv(
                in_features,
                channels,
                (size, size),
                stride,
                padding=size // 2,
                use_bias=False,
                rngs=rngs,
            ),
            nnx.BatchNorm(channels, momentum=0.9, rngs=rngs),
            nnx.PReLU(0.25),
        ]
        if stem == "imagenet":
            layers.append(STEM_POOL)
        self.stem = Sequential(*layers)
        self.blocks = nnx.List()
        for stage, depth in enumerate(depths):
            features = scaled(64 * 2**stage, width)
            for i in range(depth):
                block_stride = 2 if stage > 0 and i == 0 else 1
                block = _Block(channels, features, block_stride, bottleneck, rngs=rngs)
                self.blocks.append(block)
                channels = block.out_features
        self.head = nnx.Linear(channels, num_classes, rngs=rngs)


class _Block(nnx.Module):
    def __init__(
        self, in_features: int, features: int, stride: int, bottleneck: bool, *, rngs: nnx.Rngs
    ):
        self.out_features = 4 * features if bottleneck else features

        def norm(features: int) -> nnx.BatchNorm:
            return nnx.BatchNorm(features, momentum=0.9, rngs=rngs)

        def conv(inputs: int, outputs: int, size: int, strides: int = 1) -> nnx.Conv:
            padding = size // 2
            return nnx.Conv(
                inputs, outputs, (size, size), strides, padding=padding, use_bias=False, rngs=rngs
            )

        if bottleneck:
            sizes = [(in_features, 1, 1), (features, 3, stride), (features, 1, 1)]
        else:
            sizes = [(in_features, 3, stride), (features, 3, 1)]
        body: list[Any] = []
        for i, (inputs, size, strides) in enumerate(sizes):
            outputs = self.out_features if i == len(sizes) - 1 else features
            body += [norm(inputs), conv(inputs, outputs, size, strides), nnx.PReLU(0.25)]
        self.body = Sequential(*body)
        shortcut: list[Any] = []
        if stride > 1:
            shortcut.append(avg_pooling(stride))
        if stride > 1 or in_features != self.out_features:
            shortcut += [conv(in_features, self.out_features, 1), norm(self.out_features)]
        self.shortcut = Sequential(*shortcut)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.body(x, residual=self.shortcut(x))


ResNet18 = functools.partial(ResNet, (2, 2, 2, 2))
ResNet34 = functools.partial(ResNet, (3, 4, 6, 3))
ResNet50 = functools.partial(ResNet, (3, 4, 6, 3), bottleneck=True)
