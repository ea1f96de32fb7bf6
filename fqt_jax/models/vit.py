"""A Vision Transformer (after Dosovitskiy et al., arXiv 2010.11929), in a binary-friendly form."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from fqt_jax.models.common import scaled
from fqt_jax.models.transformer import Block

PATCH = {"small": 4, "imagenet": 16}
"""Height and width of a patch, P, by the name of the stem."""

POSITION_DEVIATION = 0.5
"""Standard deviation of positions at the start: not the usual 0.02, which signs cannot see beside
patches of deviation 1."""


class VisionTransformer(nnx.Module):
    """Patches by a strided convolution, learned positions, blocks, and a mean over the patches.

    Patches overlap: their windows are of 2P - 1 pixels at strides of P (PVT v2, arXiv 2106.13797).

    Args:
      depth: number of blocks (:class:`fqt_jax.models.transformer.Block`).
      features: width of the blocks at width 1.
      num_classes: size of the output.
      in_features: channels of the images.
      image_size: height and width of the images: multiples of the patch's.
      width: factor on the features.
      stem: ``"small"``, patches of 4x4 pixels, for images of 32x32 and the like, or
        ``"imagenet"``, of 16x16.
      rngs: the stream ``params``.

    Raises:
      ValueError: the stem is none of these, or an image is no whole number of patches.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from fqt_jax.models import VisionTransformer
      >>> sizes = {"num_classes": 10, "image_size": (8, 8)}
      >>> model = VisionTransformer(1, 16, **sizes, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 8, 8, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        depth: int,
        features: int,
        *,
        num_classes: int,
        in_features: int = 3,
        image_size: tuple[int, int] = (32, 32),
        width: float = 1.0,
        stem: str = "small",
        rngs: nnx.Rngs,
    ):
        if stem not in PATCH:
            raise ValueError(f"stem must be 'small' or 'imagenet'; got {stem!r}.")
        features, patch, (height, columns) = scaled(features, width), PATCH[stem], image_size
        if height % patch or columns % patch:
            raise ValueError(
                f"images must be a whole number of patches of {patch}x{patch} pixels; they are "
                f"{height}x{columns}."
            )
        self.image_size = (height, columns)
        size, pad = 2 * patch - 1, (patch - 1, patch - 1)
        self.stem = nnx.Conv(
            in_features, features, (size, size), patch, padding=[pad, pad], rngs=rngs
        )
        patches = height * columns // patch**2
        init = nnx.initializers.normal(POSITION_DEVIATION)
        self.positions = nnx.Param(init(rngs.params(), (patches, features)))
        self.blocks = nnx.List(Block(features, rngs=rngs) for _ in range(depth))
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.head = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``[N, H, W, C]`` to logits ``[N, num_classes]``."""
        if x.shape[1:3] != self.image_size:
            raise ValueError(
                f"images must be {self.image_size[0]}x{self.image_size[1]}, as the learned "
                f"positions are; got {x.shape[1]}x{x.shape[2]}."
            )
        x = self.stem(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.positions[...][None]
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(self.norm(x), axis=1))


ViTSmall = functools.partial(VisionTransformer, 6, 384)
"""Six blocks."""
