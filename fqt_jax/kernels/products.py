"""The three integer products of a quantized layer."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fqt_jax.binarize import PackedBits
from fqt_jax.kernels.contract import (
    Pair,
    Rounding,
    Window,
    check_forward,
    check_gradient,
    check_rounding,
    sum_dtype,
)
from fqt_jax.kernels.dispatch import dispatch


def forward(
    x: PackedBits, w: PackedBits, window: Window, *, implementation: str | None = None
) -> jax.Array:
    """Exact convolution of signs; padding contributes zero.

    Args:
      x: signs of the input, batch ``[N]``, shape ``(H, W, C)``.
      w: signs of the weights, no batch, shape ``(kh, kw, C, O)``.
      window: size, strides and padding.
      implementation: name of the implementation; ``None`` picks one.

    Returns:
      ``[N, H', W', O]``: ``int16`` where ``kh * kw * C`` fits, else ``int32``.

    Raises:
      ValueError: the operands do not fit together, or no implementation serves the case.
    """
    check_forward(x, w, window)
    size = window.output_size((x.shape[0], x.shape[1]))
    out = jax.ShapeDtypeStruct(
        (x.words.shape[0], *size, w.shape[3]), sum_dtype(math.prod(w.shape[:3]))
    )
    return dispatch("forward", out, x, w, window=window, implementation=implementation)


def input_grad(
    g: jax.Array,
    w: PackedBits,
    rounding: Rounding | None,
    window: Window,
    input_size: Pair,
    *,
    mask: PackedBits | None = None,
    compact: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Gradient with respect to the signs of the input.

    Args:
      g: gradient of the product's output, ``float32[N, H', W', O]``.
      w: signs of the weights, shape ``(kh, kw, C, O)``.
      rounding: codes over groups of samples; ``None`` uses ``g`` as it is.
      window: size, strides and padding of the forward convolution.
      input_size: ``(H, W)`` of its input.
      mask: of the shape of the input; entries whose bit is clear get zero.
      compact: leave out the samples that were not kept.
      implementation: name of the implementation; ``None`` picks one.

    Returns:
      ``float32[N, H, W, C]``, zero for samples that were not kept; with ``compact``, one row for
      each kept sample, in the order of the selection.

    Raises:
      ValueError: the operands do not fit together, or no implementation serves the case.
    """
    check_gradient(g, g.shape[0], input_size, w.shape[3], window)
    check_rounding(rounding, g, ("samples",))
    if rounding is not None and rounding.channels is not None:
        raise ValueError("the input gradient contracts over output channels: keep all of them.")
    n = g.shape[0]
    if compact and rounding is not None:
        n = rounding.lo.shape[0]
    return dispatch(
        "input_grad",
        jax.ShapeDtypeStruct((n, *input_size, w.shape[2]), jnp.float32),
        g,
        w,
        rounding,
        mask,
        window=window,
        input_size=input_size,
        compact=compact,
        implementation=implementation,
    )


def weight_grad(
    g: jax.Array,
    x: PackedBits,
    rounding: Rounding | None,
    window: Window,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Gradient with respect to the signs of the weights.

    Args:
      g: gradient of the product's output, ``float32[N, H', W', O]``.
      x: signs of the input, batch ``[N]``, shape ``(H, W, C)``.
      rounding: codes over groups of channels (integer product) or of samples (the scale is
        inside the sum, so the product is emulated in float); ``None`` uses ``g`` as it is.
      window: size, strides and padding of the forward convolution.
      implementation: name of the implementation; ``None`` picks one.

    Returns:
      ``float32[kh, kw, C, O]``, zero for channels that were not kept.

    Raises:
      ValueError: the operands do not fit together, or no implementation serves the case.
    """
    check_gradient(g, x.words.shape[0], (x.shape[0], x.shape[1]), g.shape[3], window)
    check_rounding(rounding, g, ("channels", "samples"))
    out = jax.ShapeDtypeStruct((*window.size, x.shape[2], g.shape[3]), jnp.float32)
    return dispatch(
        "weight_grad", out, g, x, rounding, window=window, implementation=implementation
    )
