"""ImageNet networks in the exact form of torchvision, timm and Keras, so that their weights load.

They have ReLU where the others of this package have PReLU: to train them at one bit, give their
signs a threshold (:func:`fqt_jax.calibrate`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fqt_jax.models.common import STEM_POOL, Blocks, max_pooling, scaled
from fqt_jax.sequential import Sequential


def _norm(features: int, rngs: nnx.Rngs, epsilon: float = 1e-5) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, momentum=0.9, epsilon=epsilon, rngs=rngs)


class TorchResNet(Blocks):
    """A ResNet of basic blocks, or of bottlenecks whose 3x3 convolution has the stride (v1.5).

    That of Keras has the stride in a block's first convolution (v1), and norms that add 1.001e-5 to
    the variance. Its convolutions have biases, which here are part of the norms' means.

    Args:
      depths: number of blocks in each stage.
      bottleneck: whether a block is 1x1, 3x3, 1x1 with four times the channels at its end.
      keras: whether the form is that of Keras.
      num_classes: size of the output.
      in_features: channels of the images.
      width: factor on the number of channels; 64, 128, 256, 512 at 1.
      rngs: the stream ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> sizes = {"num_classes": 10, "width": 0.125}
      >>> model = TorchResNet((1, 1), bottleneck=True, rngs=nnx.Rngs(0), **sizes)
      >>> model(jnp.zeros((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        bottleneck: bool = False,
        keras: bool = False,
        num_classes: int,
        in_features: int = 3,
        width: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.depths, self.keras = tuple(depths), keras
        channels = scaled(64, width)
        conv = nnx.Conv(in_features, channels, (7, 7), 2, padding=3, use_bias=False, rngs=rngs)
        norm = functools.partial(_norm, rngs=rngs, epsilon=1.001e-5 if keras else 1e-5)
        self.stem = Sequential(conv, norm(channels), nnx.relu, STEM_POOL)
        self.blocks = nnx.List()
        for stage, depth in enumerate(depths):
            features = scaled(64 * 2**stage, width)
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                block = _Block(channels, features, stride, bottleneck, keras, norm, rngs)
                self.blocks.append(block)
                channels = block.out_features
        self.head = nnx.Linear(channels, num_classes, rngs=rngs)


class _Block(nnx.Module):
    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int,
        bottleneck: bool,
        stride_first: bool,
        norm: Callable[[int], nnx.BatchNorm],
        rngs: nnx.Rngs,
    ):
        self.out_features = 4 * features if bottleneck else features

        def conv(inputs: int, outputs: int, size: int, strides: int = 1) -> list[Any]:
            layer = nnx.Conv(
                inputs,
                outputs,
                (size, size),
                strides,
                padding=size // 2,
                use_bias=False,
                rngs=rngs,
            )
            return [layer, norm(outputs)]

        if bottleneck:
            self.body = Sequential(
                *conv(in_features, features, 1, stride if stride_first else 1),
                nnx.relu,
                *conv(features, features, 3, 1 if stride_first else stride),
                nnx.relu,
                *conv(features, self.out_features, 1),
            )
        else:
            self.body = Sequential(
                *conv(in_features, features, 3, stride), nnx.relu, *conv(features, features, 3)
            )
        is_other = stride > 1 or in_features != self.out_features
        shortcut = conv(in_features, self.out_features, 1, stride) if is_other else []
        self.shortcut = Sequential(*shortcut)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.body(x, residual=self.shortcut(x)))


class TorchVGG(nnx.Module):
    """A VGG with two hidden dense layers on a 7x7 average of the last stage.

    Args:
      stages: the number of channels of each convolution, stage by stage.
      batch_norm: whether a norm follows each convolution.
      num_classes: size of the output.
      in_features: channels of the images.
      width: factor on the number of channels, and of hidden features.
      rngs: the streams ``params`` and ``dropout``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = TorchVGG(((64,), (128,)), num_classes=10, width=0.125, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 28, 28, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        *,
        batch_norm: bool = False,
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
                layers.append(nnx.Conv(in_features, features, (3, 3), padding=1, rngs=rngs))
                layers += [_norm(features, rngs)] if batch_norm else []
                layers.append(nnx.relu)
                in_features = features
            layers.append(max_pooling(2))
        self.features = Sequential(*layers)
        hidden = scaled(4096, width)
        self.classifier = Sequential(
            nnx.Linear(49 * in_features, hidden, rngs=rngs),
            nnx.relu,
            nnx.Dropout(0.5, rngs=rngs),
            nnx.Linear(hidden, hidden, rngs=rngs),
            nnx.relu,
            nnx.Dropout(0.5, rngs=rngs),
        )
        self.head = nnx.Linear(hidden, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``[N, H, W, C]`` to logits ``[N, num_classes]``."""
        if min(x.shape[1:3]) < self.smallest:
            raise ValueError(
                f"images must be at least {self.smallest}x{self.smallest}; "
                f"got {x.shape[1]}x{x.shape[2]}."
            )
        x = adaptive_avg_pool(self.features(x), 7)
        return self.head(self.classifier(x.reshape(x.shape[0], -1)))


def adaptive_avg_pool(x: jax.Array, size: int) -> jax.Array:
    """Averages to ``[N, size, size, C]`` over windows that may overlap, as PyTorch does."""
    if x.shape[1:3] == (size, size):
        return x
    rows, columns = (_averages(n, size) for n in x.shape[1:3])
    return jnp.einsum("ih,jw,nhwc->nijc", rows, columns, x, precision="highest")


def _averages(n: int, size: int) -> np.ndarray:
    weights = np.zeros((size, n), np.float32)
    for i in range(size):
        start, stop = i * n // size, -(-(i + 1) * n // size)
        weights[i, start:stop] = 1 / (stop - start)
    return weights


_STAGES = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}

TORCH_MODELS: dict[str, Callable[..., Any]] = {
    "resnet18_torch": functools.partial(TorchResNet, (2, 2, 2, 2)),
    "resnet34_torch": functools.partial(TorchResNet, (3, 4, 6, 3)),
    "resnet50_torch": functools.partial(TorchResNet, (3, 4, 6, 3), bottleneck=True),
    **{f"vgg{n}_torch": functools.partial(TorchVGG, stages) for n, stages in _STAGES.items()},
    **{
        f"vgg{n}_bn_torch": functools.partial(TorchVGG, stages, batch_norm=True)
        for n, stages in _STAGES.items()
    },
}
"""The networks of torchvision by name."""

KERAS_MODELS: dict[str, Callable[..., Any]] = {
    "resnet50_keras": functools.partial(TorchResNet, (3, 4, 6, 3), bottleneck=True, keras=True)
}
"""Those of Keras that differ; its VGG16 and VGG19 do not."""
