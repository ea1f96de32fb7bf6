"""What stays float: convolutions of layers that are not quantized, and Adam's moments."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fqt_jax.kernels.contract import Pair, Window, check_floats, convolved_shape
from fqt_jax.kernels.dispatch import dispatch


def float_conv(
    x: jax.Array, w: jax.Array, window: Window, *, implementation: str | None = None
) -> jax.Array:
    """Convolution of ``x[N, H, W, C]`` with ``w[kh, kw, C, O]``, summed in float32 or better.

    Raises:
      ValueError: the operands do not fit together.
    """
    out = jax.ShapeDtypeStruct(convolved_shape(x.shape, w.shape, window), accumulate_dtype(x, w))
    return dispatch("float_conv", out, x, w, window=window, implementation=implementation)


def float_conv_input_grad(
    g: jax.Array,
    w: jax.Array,
    window: Window,
    input_size: Pair,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Transpose of :func:`float_conv` in its first argument: ``[N, H, W, C]``.

    Raises:
      ValueError: the operands do not fit together.
    """
    shape = (g.shape[0], *input_size, w.shape[2])
    _check_gradient(g, shape, w.shape, window)
    out = jax.ShapeDtypeStruct(shape, accumulate_dtype(g, w))
    return dispatch(
        "float_conv_input_grad",
        out,
        g,
        w,
        window=window,
        input_size=input_size,
        implementation=implementation,
    )


def float_conv_weight_grad(
    x: jax.Array, g: jax.Array, window: Window, *, implementation: str | None = None
) -> jax.Array:
    """Transpose of :func:`float_conv` in its second argument: ``[kh, kw, C, O]``.

    Raises:
      ValueError: the operands do not fit together.
    """
    shape = (*window.size, x.shape[3], g.shape[3])
    _check_gradient(g, x.shape, shape, window)
    out = jax.ShapeDtypeStruct(shape, accumulate_dtype(x, g))
    return dispatch(
        "float_conv_weight_grad", out, x, g, window=window, implementation=implementation
    )


def _check_gradient(
    g: jax.Array, x_shape: tuple[int, ...], w_shape: tuple[int, ...], window: Window
) -> None:
    expected = convolved_shape(x_shape, w_shape, window)
    if g.shape != expected:
        raise ValueError(f"g must have the shape {expected} of the output; got {g.shape}.")


def accumulate_dtype(*operands: jax.Array) -> jnp.dtype:
    """The type that products of these are summed in."""
    dtype = jnp.result_type(*operands)
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def adam(
    g: jax.Array,
    m: jax.Array,
    v: jax.Array,
    factors: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of Adam's moments; see :func:`fqt_jax.optimizers.scale_by_adam`.

    Args:
      g: gradient, of any shape.
      m, v: moments, of its shape.
      factors: ``float32[7]``: ``1 - b1``, ``b1``, ``1 - b2``, ``b2``, the inverse corrections
        ``1 / (1 - b1^t)`` and ``1 / (1 - b2^t)``, and epsilon.
      implementation: name of the implementation; ``None`` picks one.

    Returns:
      The direction and the new moments, in the memory of ``g``, ``m`` and ``v`` where that can be.

    Raises:
      ValueError: the operands do not fit together.
    """
    if not g.shape == m.shape == v.shape:
        raise ValueError(f"g, m and v must have one shape; got {g.shape}, {m.shape} and {v.shape}.")
    check_floats((7,), factors=factors)
    like = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (g, m, v))
    return dispatch("adam", like, g, m, v, factors, implementation=implementation)
