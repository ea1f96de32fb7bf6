r"""Quantized convolution and dense product as pure functions with their own gradient.

With hats for signs and ``*`` for the convolution::

    y = alpha (x^ * w^) + bias                  forward: an exact integer product, then a scale
    g = alpha dL/dy                             backward: alpha is folded in before quantizing
    dL/dx^ = Q_sample(g) *^T w^                 groups are samples: the scale leaves the sum
    dL/dw^ = x^ * Q_channel(g)                  groups are output channels: likewise
    dL/dx = 1[|x| <= 1] dL/dx^                  straight-through, and the same for w

(arXiv 2408.14267, sections 3 and 4.) What backward keeps of ``x`` is two bits an entry.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from fqt_jax import kernels
from fqt_jax.binarize import PackedBits, check_float, weight_scale
from fqt_jax.grouping import roundings
from fqt_jax.kernels import native, transforms
from fqt_jax.kernels.contract import Window
from fqt_jax.kernels.float_conv import conv as float_conv
from fqt_jax.kernels.float_conv import conv_input_grad, conv_weight_grad
from fqt_jax.kernels.transforms import Line
from fqt_jax.recipe import FQT1, Recipe
from fqt_jax.rounding import seeds_from_key
from fqt_jax.sharding import varying_together

Padding = str | int | Sequence[int | tuple[int, int]]

RESIDUAL_NAMES = ("fqt_signs", "fqt_clip", "fqt_sums")
"""Names of what backward keeps, for :func:`jax.checkpoint_policies.save_only_these_names`."""


class _Static(NamedTuple):
    recipe: Recipe
    window: Window
    implementation: str | None


class _Residuals(NamedTuple):
    x_signs: PackedBits
    x_clip: PackedBits | None  # where |x| <= 1
    w: jax.Array
    w_signs: PackedBits
    z: jax.Array | None  # the integer sums; only the gradient of alpha needs them
    alpha: jax.Array | None
    seeds: list[jax.Array] | None


def conv(
    x: jax.Array,
    w: jax.Array,
    *,
    key: jax.Array | None = None,
    recipe: Recipe = FQT1,
    strides: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Two-dimensional convolution under a recipe: signs forward, quantized gradients backward.

    .. math:: y = \alpha_o\, (\mathrm{sign}(x) * \mathrm{sign}(w)) + \mathrm{bias}_o

    Padding adds exactly zero. Gradients follow the recipe (see the module's docstring); those of
    ``alpha`` and ``bias`` stay float. With ``recipe.gradient`` unset they are exact for the signs.

    Args:
      x: input, ``[N, H, W, C]``, floating point. A NaN makes its sample's output NaN.
      w: weights, ``[kh, kw, C, O]``, floating point. A NaN makes its channel's output NaN.
      key: JAX random key for rounding and pruning; needed where ``recipe.gradient`` is set, and
        ignored otherwise. Use a fresh one in each step.
      recipe: what is quantized and how; ``FULL_PRECISION`` gives an ordinary convolution.
      strides: one number, or one for each spatial axis.
      padding: ``"SAME"``, ``"VALID"``, a number, or ``(before, after)`` for each spatial axis.
      scale: the weight scale ``[O]``; needed where ``recipe.scale`` is ``"learned"``, and an error
        elsewhere.
      bias: ``[O]``, added in float.
      implementation: name of the kernels' implementation; ``None`` picks the best one.

    Returns:
      ``y``, ``[N, H', W', O]``, of the type of ``x``.

    Raises:
      TypeError: an operand is not a floating-point array.
      ValueError: shapes, strides, padding, key or scale do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fqt_jax as fqt
      >>> x = jax.random.normal(jax.random.key(0), (8, 6, 6, 16))
      >>> w = jax.random.normal(jax.random.key(1), (3, 3, 16, 32))
      >>> y = fqt.conv(x, w, key=jax.random.key(2), recipe=fqt.FQT1)
      >>> y.shape
      (8, 6, 6, 32)
      >>> loss = lambda w: (fqt.conv(x, w, key=jax.random.key(2)) ** 2).mean()
      >>> jax.jit(jax.grad(loss))(w).shape
      (3, 3, 16, 32)
    """
    check_float("x", x)
    check_float("w", w)
    if x.ndim != 4 or w.ndim != 4:
        raise ValueError(f"x must be [N, H, W, C] and w [kh, kw, C, O]; got {x.shape}, {w.shape}.")
    if x.shape[3] != w.shape[2]:
        raise ValueError(f"x has {x.shape[3]} channels, but w takes {w.shape[2]}.")
    window = resolve_window(w.shape[:2], x.shape[1:3], strides, padding)
    window.output_size((x.shape[1], x.shape[2]))
    if bias is not None:
        _check_channels("bias", bias, w)
    static = _Static(recipe, window, implementation)
    y = _apply(static, x, w, key, scale)
    if bias is not None:
        y = y + bias.astype(y.dtype).reshape(1, 1, 1, -1)
    return y


def dense(
    x: jax.Array,
    w: jax.Array,
    *,
    key: jax.Array | None = None,
    recipe: Recipe = FQT1,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Matrix product under a recipe: signs forward, quantized gradients backward.

    .. math:: y = \alpha_o\, (\mathrm{sign}(x)\, \mathrm{sign}(w)) + \mathrm{bias}_o

    The rows of ``x``, that is all its leading axes together, are the samples of the quantizer.

    Args:
      x: input, ``[..., C]``, floating point.
      w: weights, ``[C, O]``, floating point.
      key, recipe, scale, bias, implementation: as in :func:`conv`.

    Returns:
      ``y``, ``[..., O]``, of the type of ``x``.

    Raises:
      TypeError: an operand is not a floating-point array.
      ValueError: shapes, key or scale do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fqt_jax as fqt
      >>> x = jnp.array([[0.5, -2.0, 1.0]])
      >>> w = jnp.array([[1.0], [1.0], [-4.0]])
      >>> fqt.dense(x, w, recipe=fqt.QAT)  # signs (1 - 1 - 1), times the mean of |w|, 2
      Array([[-2.]], dtype=float32)
    """
    check_float("x", x)
    check_float("w", w)
    if x.ndim < 1 or w.ndim != 2:
        raise ValueError(f"x must be [..., C] and w [C, O]; got {x.shape} and {w.shape}.")
    if x.shape[-1] != w.shape[0]:
        raise ValueError(f"x has {x.shape[-1]} features, but w takes {w.shape[0]}.")
    rows = x.reshape(-1, 1, 1, x.shape[-1])
    y = conv(
        rows,
        w.reshape(1, 1, *w.shape),
        key=key,
        recipe=recipe,
        padding="VALID",
        scale=scale,
        bias=bias,
        implementation=implementation,
    )
    return y.reshape(*x.shape[:-1], w.shape[1])


def resolve_window(
    size: Sequence[int], input_size: Sequence[int], strides: Any, padding: Padding
) -> Window:
    """The :class:`Window` of a convolution, with padding made explicit.

    Raises:
      ValueError: strides or padding are not of a known form.
    """
    try:
        each = (strides, strides) if isinstance(strides, int) else strides
        pair = tuple(operator.index(s) for s in each)
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"strides must be one or two positive integers; got {strides!r}."
        ) from None
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise ValueError(
                f"padding must be 'SAME', 'VALID' or explicit numbers; got {padding!r}."
            )
        pads = lax.padtype_to_pads(input_size, size, pair, padding.upper())
    else:
        try:
            each = [padding, padding] if isinstance(padding, int) else list(padding)
            both = [(p, p) if isinstance(p, int) else p for p in each]
            pads = [(operator.index(before), operator.index(after)) for before, after in both]
            if len(pads) != 2:
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(
                f"padding must be a string, a number or two (before, after); got {padding!r}."
            ) from None
    (top, bottom), (left, right) = pads
    return Window((size[0], size[1]), pair, ((top, bottom), (left, right)))


def _check_channels(name: str, value: jax.Array, w: jax.Array) -> None:
    check_float(name, value)
    if value.shape != w.shape[-1:]:
        raise ValueError(
            f"{name} must have one entry for each output channel, {w.shape[-1:]}; "
            f"got {value.shape}."
        )


def _apply(
    static: _Static, x: jax.Array, w: jax.Array, key: jax.Array | None, scale: jax.Array | None
) -> jax.Array:
    recipe = static.recipe
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe; got {recipe!r}.")
    kernels.check_implementation(static.implementation)
    if (scale is not None) != (recipe.scale == "learned"):
        raise ValueError(
            "recipe.scale is 'learned': pass scale=."
            if scale is None
            else f"scale= is for recipes with scale='learned'; this one has {recipe.scale!r}."
        )
    if not recipe.binary:
        return _float_conv(static, *varying_together((x, w)))
    if recipe.gradient is not None and key is None:
        raise ValueError("this recipe rounds gradients at random: pass key=jax.random.key(...).")
    if recipe.scale == "mean_abs":
        scale = weight_scale(w)
    if scale is not None:
        _check_channels("scale", scale, w)
    seeds = None if recipe.gradient is None or key is None else seeds_from_key(key, 4)
    return _binary_conv(static, *varying_together((x, w, scale, seeds)))


# Above these XLA's products are as fast: measured at 224x224x3, and on 1x1 windows of 64 channels.
_FEW_CHANNELS = 16
_FEW_WEIGHTS = 2**16


def serves_images(x: jax.Array, w: jax.Array, implementation: str | None) -> bool:
    """Whether the native float convolution of images, of few channels, serves."""
    return (
        implementation in (None, "native")
        and native.unavailable() is None
        and w.shape[:2] != (1, 1)
        and x.dtype == w.dtype == jnp.float32
        and x.shape[3] < _FEW_CHANNELS
        and x.size > 0
        and 0 < w.size <= _FEW_WEIGHTS
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _float_conv(static: _Static, x: jax.Array, w: jax.Array) -> jax.Array:
    if serves_images(x, w, static.implementation):
        return native.float_conv(x, w, static.window)
    return float_conv(x, w.astype(x.dtype), static.window).astype(x.dtype)


def _float_conv_fwd(static: _Static, x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    return _float_conv(static, x, w), (x, w)


def _float_conv_bwd(static: _Static, residuals: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    dx = conv_input_grad(dy, w.astype(x.dtype), static.window, x.shape[1:3]).astype(x.dtype)
    if serves_images(x, w, static.implementation):
        return dx, native.float_conv_weight_grad(x, dy, static.window)
    return dx, conv_weight_grad(x, dy, static.window).astype(w.dtype)


_float_conv.defvjp(_float_conv_fwd, _float_conv_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _binary_conv(
    static: _Static,
    x: jax.Array,
    w: jax.Array,
    alpha: jax.Array | None,
    seeds: list[jax.Array] | None,
) -> jax.Array:
    """``alpha (x^ * w^)``. Reaches to where values become float: integers have no cotangent."""
    return _binary_conv_fwd(static, x, w, alpha, seeds)[0]


def _binary_conv_fwd(
    static: _Static,
    x: jax.Array,
    w: jax.Array,
    alpha: jax.Array | None,
    seeds: list[jax.Array] | None,
) -> tuple[jax.Array, _Residuals]:
    x_signs, inside, nan_sample = _encode(x, static.implementation)
    x_signs = checkpoint_name(x_signs, "fqt_signs")
    x_clip = checkpoint_name(inside, "fqt_clip") if static.recipe.clip else None
    w_signs = PackedBits.pack(w >= 0, batch_ndim=0)
    z = kernels.forward(x_signs, w_signs, static.window, implementation=static.implementation)
    z = checkpoint_name(z, "fqt_sums")
    y = z.astype(jnp.float32)
    if alpha is not None:
        y = y * alpha.astype(jnp.float32).reshape(1, 1, 1, -1)
    # Signs would hide a NaN, and training would go on with numbers that mean nothing.
    bad_channel = jnp.isnan(w).any(axis=(0, 1, 2)).reshape(1, 1, 1, -1)
    nan = jnp.where(bad_channel, jnp.float32(jnp.nan), jnp.float32(0))
    y = y + (nan_sample.reshape(-1, 1, 1, 1) + nan)
    kept_z = None if alpha is None else z
    residuals = _Residuals(x_signs, x_clip, w, w_signs, kept_z, alpha, seeds)
    return y.astype(x.dtype), residuals


def _encode(x: jax.Array, implementation: str | None) -> tuple[PackedBits, PackedBits, jax.Array]:
    """Signs of ``x``, where ``|x| <= 1``, and for each sample NaN where it has one, else zero."""
    by_native = implementation in (None, "native") and native.unavailable() is None
    if by_native and x.dtype == jnp.float32 and x.size:
        one, zero = jnp.ones(x.shape[3], jnp.float32), jnp.zeros(x.shape[3], jnp.float32)
        return transforms.encode(x, Line(one, zero, one, zero, one, zero), 1)
    nan = jnp.where(jnp.isnan(x).any(axis=(1, 2, 3)), jnp.float32(jnp.nan), jnp.float32(0))
    return PackedBits.pack(x >= 0), PackedBits.pack(jnp.abs(x) <= 1), nan


def _binary_conv_bwd(
    static: _Static, residuals: _Residuals, dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None, None]:
    recipe, window, implementation = static
    x_signs, x_clip, w, w_signs, z, alpha, seeds = residuals
    g = dy.astype(jnp.float32)
    d_alpha = None
    if alpha is not None and z is not None:
        d_alpha = jnp.sum(g * z.astype(jnp.float32), axis=(0, 1, 2)).astype(alpha.dtype)
        g = g * alpha.astype(jnp.float32).reshape(1, 1, 1, -1)
    for_input, for_weight = None, None
    if recipe.gradient is not None and seeds is not None and g.size:
        for_input, for_weight = roundings(g, recipe.gradient, seeds)
    input_size = (x_signs.shape[0], x_signs.shape[1])
    dx = kernels.input_grad(
        g, w_signs, for_input, window, input_size, mask=x_clip, implementation=implementation
    )
    dw = kernels.weight_grad(g, x_signs, for_weight, window, implementation=implementation)
    if x_clip is not None:
        dw = jnp.where(jnp.abs(w) <= 1, dw, jnp.float32(0))
    return dx.astype(dy.dtype), dw.astype(w.dtype), d_alpha, None


_binary_conv.defvjp(_binary_conv_fwd, _binary_conv_bwd)
