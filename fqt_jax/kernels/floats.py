"""What stays float: convolutions of layers that are not quantized, and Adam's moments."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fqt_jax.kernels.contract import Pair, Window
from fqt_jax.kernels.dispatch import dispatch


def float_conv(
    x: jax.Array, w: jax.Array, window: Window, *, implementation: str | None = None
) -> jax.Array:
    """Convolution of ``x[N, H, W, C]`` with ``w[kh, kw, C, O]``, summed in float32 or better."""
    size = window.output_size((x.shape[1], x.shape[2]))
    out = jax.ShapeDtypeStruct((x.shape[0], *size, w.shape[3]), accumulate_dtype(x, w))
    return dispatch("float_conv", out, x, w, window=window, implementation=implementation)


def float_conv_input_grad(
    g: jax.Array,
    w: jax.Array,
    window: Window,
    input_size: Pair,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Transpose of :func:`float_conv` in its first argument: ``[N, H, W, C]``."""
    out = jax.ShapeDtypeStruct((g.shape[0], *input_size, w.shape[2]), accumulate_dtype(g, w))
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
    """Transpose of :func:`float_conv` in its second argument: ``[kh, kw, C, O]``."""
    out = jax.ShapeDtypeStruct((*window.size, x.shape[3], g.shape[3]), accumulate_dtype(x, g))
    return dispatch(
        "float_conv_weight_grad", out, x, g, window=window, implementation=implementation
    )


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
    """
    like = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (g, m, v))
    return dispatch("adam", like, g, m, v, factors, implementation=implementation)
