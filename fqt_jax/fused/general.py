"""A binary product of any geometry, computed in float on signs and on the values of codes.

The integer kernels have forms for the convolution of images and for the dense product. What they
have none for, such as a dilated or grouped convolution, is computed here by whatever function
computes it in float: with the same signs, scales and quantized gradients (the formulas are those of
:mod:`fqt_jax.fused.chain`), exact in its sums as long as they stay below 2**24, but without the
speed of packed bits. What it keeps for the backward pass is packed all the same: two bits of each
entry of ``x``, and the integer sums where the scale has a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fqt_jax.binarize import PackedBits, binarize, weight_scale
from fqt_jax.grouping import roundings
from fqt_jax.kernels.contract import sum_dtype
from fqt_jax.kernels.scaling import quantized
from fqt_jax.recipe import Recipe
from fqt_jax.sharding import varying_together

Multiply = Callable[..., jax.Array]
"""``(x[N, ...], w[..., O]) -> y[N, ..., O]``, linear in each."""


class _Operands(NamedTuple):
    x: jax.Array
    w: jax.Array
    scale: jax.Array | None
    seeds: list[jax.Array] | None


def run_product(
    multiply: Multiply,
    recipe: Recipe,
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array | None,
    seeds: list[jax.Array] | None,
) -> jax.Array:
    """``alpha multiply(sign(x), sign(w))`` in float32, with the gradients of the recipe."""
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    if recipe.scale == "mean_abs":
        scale = weight_scale(w)
    elif scale is not None:
        scale = scale.astype(jnp.float32)
    return _run(multiply, recipe, varying_together(_Operands(x, w, scale, seeds)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(multiply: Multiply, recipe: Recipe, operands: _Operands) -> jax.Array:
    return _fwd(multiply, recipe, operands)[0]


def _fwd(multiply: Multiply, recipe: Recipe, operands: _Operands) -> tuple[jax.Array, Any]:
    x, w, scale, seeds = operands
    z = multiply(binarize(x), binarize(w))
    y = z if scale is None else z * scale.reshape((1,) * (z.ndim - 1) + (-1,))
    signs = PackedBits.pack(x >= 0, batch_ndim=1)
    clip = PackedBits.pack(jnp.abs(x) <= 1, batch_ndim=1) if recipe.clip else None
    sums = None if scale is None else z.astype(sum_dtype(w.size // w.shape[-1]))
    return y, (signs, clip, w, scale, sums, seeds)


def _bwd(multiply: Multiply, recipe: Recipe, kept: Any, dy: jax.Array) -> tuple[_Operands]:
    signs, clip, w, scale, sums, seeds = kept
    x_signs, w_signs = signs.signs(), binarize(w)
    g, d_scale = dy, None
    if scale is not None:
        d_scale = jnp.sum(dy * sums.astype(jnp.float32), axis=tuple(range(dy.ndim - 1)))
        g = dy * scale.reshape((1,) * (dy.ndim - 1) + (-1,))
    for_input = for_weight = g
    if recipe.gradient is not None and seeds is not None and g.size:
        images = g.reshape(g.shape[0], -1, 1, g.shape[-1])
        both = roundings(images, recipe.gradient, seeds)
        for_input, for_weight = (quantized(images, each).reshape(g.shape) for each in both)
    (dx,) = jax.vjp(lambda x: multiply(x, w_signs), x_signs)[1](for_input)
    (dw,) = jax.vjp(lambda w: multiply(x_signs, w), w_signs)[1](for_weight)
    if clip is not None:
        dx = jnp.where(clip.unpack(), dx, jnp.float32(0))
        dw = jnp.where(jnp.abs(w) <= 1, dw, jnp.float32(0))
    no_seeds: Any = None
    return (_Operands(dx, dw, d_scale, no_seeds),)


_run.defvjp(_fwd, _bwd)
