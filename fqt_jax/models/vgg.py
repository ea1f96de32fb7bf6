"""VGG with batch norm, PReLU and a pooled head (Simonyan and Zisserman, arXiv 1409.1556)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from fqt_jax.chain import Between, run_chain
from fqt_jax.models.common import scaled


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
        self.stages = nnx.List()
        for stage in stages:
            layers = nnx.List()
            for channels in stage:
                out_features = scaled(channels, width)
                layers.append(_ConvNormAct(in_features, out_features, rngs=rngs))
                in_features = out_features
            self.stages.append(layers)
        self.head = nnx.Linear(in_features, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``[N, H, W, C]`` to logits ``[N, num_classes]``."""
        smallest = 2 ** len(self.stages)
        if min(x.shape[1:3]) < smallest:
            raise ValueError(
                f"images must be at least {smallest}x{smallest} for {len(self.stages)} stages; "
                f"got {x.shape[1]}x{x.shape[2]}."
            )
        layers = [layer for stage in self.stages for layer in stage]
        betweens = [Between()]
        betweens += [
            Between(layer.norm, layer.act, pool=2 if layer is stage[-1] else 1)
            for stage in self.stages
            for layer in stage
        ]
        x = run_chain(x, betweens, [layer.conv for layer in layers])
        return self.head(jnp.mean(x, axis=(1, 2)))


class _ConvNormAct(nnx.Module):
    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(in_features, out_features, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(out_features, momentum=0.9, rngs=rngs)
        self.act = nnx.PReLU(0.25)


VGGSmall = functools.partial(VGG, ((32, 32), (64, 64), (128, 128)))
"""Six convolutions, for images of 16x16 and the like."""
VGG11 = functools.partial(VGG, ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2))
VGG13 = functools.partial(VGG, ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2))
VGG16 = functools.partial(VGG, ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3))
VGG19 = functools.partial(VGG, ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4))
