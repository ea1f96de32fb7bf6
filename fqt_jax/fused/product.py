"""A single product of a chain: its weights, and its two gradients."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fqt_jax import kernels
from fqt_jax.binarize import PackedBits
from fqt_jax.fused.parts import Link, Weights
from fqt_jax.grouping import roundings


def encode_weights(
    link: Link, weights: Weights, implementation: str | None
) -> tuple[PackedBits, jax.Array]:
    """Signs of the weights, and the scale of each channel; NaN where the weights have one."""
    w = weights.kernel.astype(jnp.float32)
    signs, mean_abs = kernels.encode_weights(w, implementation=implementation)
    if link.recipe.scale == "mean_abs":
        return signs, mean_abs
    scale = jnp.ones_like(mean_abs)
    if weights.scale is not None:
        scale = weights.scale.astype(jnp.float32)
    return signs, scale + jnp.where(jnp.isnan(mean_abs), jnp.float32(jnp.nan), jnp.float32(0))


def product_gradients(
    link: Link,
    g: jax.Array,
    signs: PackedBits,
    w_signs: PackedBits,
    clip: PackedBits | None,
    seeds: Sequence[jax.Array] | None,
    bounds: tuple[jax.Array, jax.Array] | None,
    *,
    compact: bool,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Gradients of a product's input and of the signs of its weights.

    Args:
      link: the product.
      g: gradient of its sums, ``float32[N, H', W', O]``.
      signs: of its input.
      w_signs: of its weights.
      clip: where the gradient of the input is not cut off; ``None`` for everywhere.
      seeds: of random rounding and pruning, where the recipe asks for them.
      bounds: minimum and maximum of ``g`` for each sample and channel, where they are known.
      compact: leave out of the input's gradient the samples that were not kept.
      implementation: of the kernels.

    Returns:
      The gradient of the input; the indices of its samples, ``None`` for all; and the gradient
      with respect to the signs of the weights.
    """
    for_input, for_weight = None, None
    if link.recipe.gradient is not None and seeds is not None and g.size:
        for_input, for_weight = roundings(g, link.recipe.gradient, seeds, bounds)
    d = kernels.input_grad(
        g,
        w_signs,
        for_input,
        link.window,
        (signs.shape[0], signs.shape[1]),
        mask=clip,
        compact=compact,
        implementation=implementation,
    )
    dw = kernels.weight_grad(g, signs, for_weight, link.window, implementation=implementation)
    samples = None
    if compact and for_input is not None and for_input.samples is not None:
        samples = for_input.samples.indices
    return d, samples, dw


def finish_weights(
    link: Link, weights: Weights, dw: jax.Array, d_scale: jax.Array, implementation: str | None
) -> Weights:
    """Gradients of a product's parameters, from those of the signs and of the scale."""
    recipe, (w, learned) = link.recipe, weights
    d_mean_abs = jnp.zeros_like(d_scale)
    if recipe.scale == "mean_abs":
        d_mean_abs = d_scale / jnp.float32(w.size // w.shape[-1])  # the scale is the mean of |w|
    if recipe.clip or recipe.scale == "mean_abs":
        dw = kernels.finish_weight_grad(
            dw, w.astype(jnp.float32), d_mean_abs, clip=recipe.clip, implementation=implementation
        )
    return Weights(dw.astype(w.dtype), None if learned is None else d_scale.astype(learned.dtype))
