"""Quantized products as pure functions with their own gradient.

Convolution of images and dense product are chains of one product (:mod:`fqt_jax.fused.chain`, which
has the formulas), computed by integer kernels; :func:`product` is any other, computed in float.
What backward keeps of ``x`` is two bits an entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fqt_jax import kernels
from fqt_jax.binarize import binarize, check_float
from fqt_jax.fused import (
    Chain,
    Gap,
    GapParams,
    Link,
    Multiply,
    Operands,
    Weights,
    float_conv,
    run_chain,
    run_product,
)
from fqt_jax.recipe import FQT1, Recipe, as_recipe
from fqt_jax.rounding import seeds_from_key
from fqt_jax.sharding import varying_together
from fqt_jax.windows import Padding, resolve_window


def conv(
    x: jax.Array,
    w: jax.Array,
    *,
    key: jax.Array | None = None,
    recipe: Recipe | str = FQT1,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    threshold: jax.Array | None = None,
    spread: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Two-dimensional convolution under a recipe: signs forward, quantized gradients backward.

    .. math:: y = \alpha_o\, (\mathrm{sign}(x) * \mathrm{sign}(w)) + \mathrm{bias}_o

    Padding adds exactly zero. Gradients follow the recipe (see the module's docstring); those of
    ``alpha`` and ``bias`` stay float. With ``recipe.gradient`` unset they are exact for the signs.

    With a threshold, signs and their straight-through gradient are those of
    :math:`u = (x - \mathrm{threshold}_c) / \mathrm{spread}_c`. So the gradient passes where ``x``
    is within one ``spread`` of the threshold, and reaches ``threshold`` and ``spread`` by the chain
    rule (as in ReActNet, arXiv 2003.03488, section 4.2, whose spread is 1). Float weights
    (``recipe.weights``) stay as they are, with ``alpha`` 1.

    Args:
      x: input, ``[N, H, W, C]``, floating point. A NaN makes its sample's output NaN.
      w: weights, ``[kh, kw, C, O]``, floating point. A NaN makes its channel's output NaN.
      key: JAX random key for rounding and pruning; needed where ``recipe.gradient`` is set, and
        ignored otherwise. Use a fresh one in each step.
      recipe: what is quantized and how, or its name; ``FULL_PRECISION`` gives an ordinary
        convolution.
      strides: one number, or one for each spatial axis.
      padding: ``"SAME"``, ``"VALID"``, a number, or ``(before, after)`` for each spatial axis.
      scale: the weight scale ``[O]``; needed where ``recipe.scale`` is learned, and an error
        elsewhere.
      bias: ``[O]``, added in float.
      threshold, spread: of the signs of ``x``, ``[C]`` each; needed where ``recipe.threshold`` is
        not ``"zero"``, and an error elsewhere. ``spread`` is positive.
      implementation: name of the kernels' implementation; ``None`` picks the best one.

    Returns:
      ``y``, ``[N, H', W', O]``, of the type of ``x``.

    Raises:
      TypeError: an operand is not a floating-point array.
      ValueError: shapes, strides, padding, key, scale or threshold do not fit.

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
    recipe = as_recipe("recipe", recipe)
    check_float("x", x)
    check_float("w", w)
    if x.ndim != 4 or w.ndim != 4:
        raise ValueError(f"x must be [N, H, W, C] and w [kh, kw, C, O]; got {x.shape}, {w.shape}.")
    if x.shape[3] != w.shape[2]:
        raise ValueError(f"x has {x.shape[3]} channels, but w takes {w.shape[2]}.")
    window = resolve_window(w.shape[:2], x.shape[1:3], strides, padding)
    window.output_size((x.shape[1], x.shape[2]))
    _check_layer(recipe, key, implementation, scale=scale, threshold=threshold, spread=spread)
    for name, value in (("bias", bias), ("scale", scale)):
        _check_channels(name, value, "output", w.shape[3])
    for name, value in (("threshold", threshold), ("spread", spread)):
        _check_channels(name, value, "input", w.shape[2])
    if not recipe.binary_weights:
        x, w = varying_together((_signs(x, recipe, threshold, spread), w))
        y = float_conv(x, w, window, implementation)
        return y if bias is None else y + bias.astype(y.dtype).reshape(1, 1, 1, -1)
    chain = Chain(
        gaps=(Gap(), Gap()),
        links=(Link(recipe, window),),
        first=None,
        x_dtype=x.dtype,
        dtype=x.dtype,
        has_residual=False,
        implementation=implementation,
    )
    operands = Operands(
        x,
        first=None,
        weights=[Weights(w, scale)],
        params=[GapParams(threshold=threshold, spread=spread), GapParams(bias=bias)],
        running=[None, None],
        seeds=[None if recipe.gradient is None or key is None else seeds_from_key(key, 4)],
    )
    return run_chain(chain, operands)[0]


def dense(
    x: jax.Array,
    w: jax.Array,
    *,
    key: jax.Array | None = None,
    recipe: Recipe | str = FQT1,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    threshold: jax.Array | None = None,
    spread: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Matrix product under a recipe: signs forward, quantized gradients backward.

    .. math:: y = \alpha_o\, (\mathrm{sign}(x)\, \mathrm{sign}(w)) + \mathrm{bias}_o

    The rows of ``x``, that is all its leading axes together, are the samples of the quantizer.

    Args:
      x: input, ``[..., C]``, floating point.
      w: weights, ``[C, O]``, floating point.
      key, recipe, scale, bias, threshold, spread, implementation: as in :func:`conv`.

    Returns:
      ``y``, ``[..., O]``, of the type of ``x``.

    Raises:
      TypeError: an operand is not a floating-point array.
      ValueError: shapes, key, scale or threshold do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fqt_jax as fqt
      >>> x = jnp.array([[0.5, -2.0, 1.0]])
      >>> w = jnp.array([[1.0], [1.0], [-4.0]])
      >>> fqt.dense(x, w, recipe=fqt.QAT)  # signs (1 - 1 - 1), times the mean of |w|, 2
      Array([[-2.]], dtype=float32)
    """
    recipe = as_recipe("recipe", recipe)
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
        threshold=threshold,
        spread=spread,
        implementation=implementation,
    )
    return y.reshape(*x.shape[:-1], w.shape[1])


def product(
    x: jax.Array,
    w: jax.Array,
    multiply: Multiply,
    *,
    key: jax.Array | None = None,
    recipe: Recipe | str = FQT1,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    threshold: jax.Array | None = None,
    spread: jax.Array | None = None,
) -> jax.Array:
    r"""Any product under a recipe, computed in float: signs forward, quantized gradients backward.

    .. math:: y = \alpha_o\, \mathrm{multiply}(\mathrm{sign}(x), \mathrm{sign}(w)) + \mathrm{bias}_o

    For products that the integer kernels have no form for. It computes with the same signs, scales
    and codes as :func:`conv`, and keeps as little, but takes the time of ``multiply`` in float.

    Args:
      x: input, ``[N, ..., C]``, floating point; the first axis is that of the samples.
      w: weights, ``[..., O]``, floating point.
      multiply: ``(x, w) -> y[N, ..., O]``, linear in each. A hashable function that is defined
        once, since a new one is compiled anew.
      key, recipe, scale, bias, threshold, spread: as in :func:`conv`.

    Returns:
      ``y``, of the type of ``x``.

    Raises:
      TypeError: an operand is not a floating-point array.
      ValueError: key, scale or threshold do not fit, or ``multiply`` gives another shape.

    Example:
      >>> import functools
      >>> import jax, jax.numpy as jnp
      >>> import fqt_jax as fqt
      >>> dilated = functools.partial(
      ...     jax.lax.conv_general_dilated,
      ...     window_strides=(1, 1),
      ...     padding="SAME",
      ...     rhs_dilation=(2, 2),
      ...     dimension_numbers=("NHWC", "HWIO", "NHWC"),
      ... )
      >>> x, w = jnp.ones((4, 8, 8, 16)), jnp.ones((3, 3, 16, 32))
      >>> fqt.product(x, w, dilated, key=jax.random.key(0)).shape
      (4, 8, 8, 32)
    """
    recipe = as_recipe("recipe", recipe)
    check_float("x", x)
    check_float("w", w)
    _check_layer(recipe, key, None, scale=scale, threshold=threshold, spread=spread)
    shape = jax.eval_shape(multiply, x, w.astype(x.dtype)).shape
    if shape[:1] != x.shape[:1] or shape[-1:] != w.shape[-1:]:
        raise ValueError(
            f"multiply must give [{x.shape[0]}, ..., {w.shape[-1]}] from x {x.shape} and w "
            f"{w.shape}; it gives {shape}."
        )
    for name, value in (("bias", bias), ("scale", scale)):
        _check_channels(name, value, "output", w.shape[-1])
    for name, value in (("threshold", threshold), ("spread", spread)):
        _check_channels(name, value, "input", x.shape[-1])
    if not recipe.binary_weights:
        y = multiply(_signs(x, recipe, threshold, spread), w.astype(x.dtype))
    else:
        u = _shifted(x, threshold, spread)
        seeds = None if recipe.gradient is None or key is None else seeds_from_key(key, 4)
        y = run_product(multiply, recipe, u, w, scale, seeds)
    if bias is not None:
        y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return y.astype(x.dtype)


def _shifted(x: jax.Array, threshold: jax.Array | None, spread: jax.Array | None) -> jax.Array:
    """What the signs are of: ``(x - threshold) / spread`` where there is a threshold."""
    if threshold is None or spread is None:
        return x
    shape, dtype = (1,) * (x.ndim - 1) + (-1,), jnp.promote_types(x.dtype, threshold.dtype)
    threshold, spread = (a.astype(dtype).reshape(shape) for a in (threshold, spread))
    return (x.astype(dtype) - threshold) / spread


def _signs(
    x: jax.Array, recipe: Recipe, threshold: jax.Array | None, spread: jax.Array | None
) -> jax.Array:
    """An input as float weights see it: as it is, or its signs."""
    if not recipe.binary:
        return x
    return binarize(_shifted(x, threshold, spread), clip=recipe.clip).astype(x.dtype)


def _check_layer(
    recipe: Recipe,
    key: jax.Array | None,
    implementation: str | None,
    *,
    scale: jax.Array | None,
    threshold: jax.Array | None,
    spread: jax.Array | None,
) -> None:
    """Raises unless recipe, key, implementation and parameters of a layer go together."""
    kernels.check_implementation(implementation)
    if (scale is not None) != recipe.learns_scale:
        raise ValueError(
            f"recipe.scale is {recipe.scale!r}: pass scale=."
            if scale is None
            else f"scale= is for recipes with scale='learned'; this one has {recipe.scale!r}."
        )
    for name, value in (("threshold", threshold), ("spread", spread)):
        if (value is not None) != (recipe.threshold != "zero"):
            raise ValueError(
                f"recipe.threshold is {recipe.threshold!r}: pass {name}=."
                if value is None
                else f"{name}= is for recipes with a threshold; that of this one is 'zero'."
            )
    if recipe.gradient is not None:
        _check_key(key)


def _check_key(key: Any) -> None:
    if key is None:
        raise ValueError("this recipe rounds gradients at random: pass key=jax.random.key(...).")
    if not isinstance(key, jax.Array):
        raise TypeError(
            f"key must be a JAX random key, such as jax.random.key(0); got {type(key).__name__}."
        )
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not is_typed and key.dtype != jnp.uint32:
        raise TypeError(
            f"key must be a JAX random key, such as jax.random.key(0); got {key.dtype} {key.shape}."
        )
    if key.ndim != (0 if is_typed else 1):
        raise ValueError(f"key must be one key; got {key.shape} of them: jax.vmap takes many.")


def _check_channels(name: str, value: jax.Array | None, side: str, channels: int) -> None:
    if value is None:
        return
    check_float(name, value)
    if value.shape != (channels,):
        raise ValueError(
            f"{name} must have one entry for each {side} channel, {(channels,)}; got {value.shape}."
        )
