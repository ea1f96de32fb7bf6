"""Float convolutions and their two gradients, by whichever of XLA's routes is fast on a platform.

Measured on two AVX2 cores, in G multiply-adds/s: XLA's convolution does 27 to 67 forward and back
to the input on images of 4x4 and larger, but below 1 on 2x2, where im2col with one dot does 37 to
50, and 8 on 3x3 windows of an image of three channels, where that does 12. Its weight gradient
does 2 on 32x32x64; one dot for each tap of the window does 12 to 50 everywhere, and im2col is best
where there are few input channels. Elsewhere than on the CPU, XLA's own convolution is used
throughout. A layer whose input are images of few channels does not come here where the native
kernels serve: they took 12 ms where im2col took 34, on 128 images of 32x32x3 with 64 outputs, and
11 for 26 of the weight gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fqt_jax.kernels.contract import Pair, Window
from fqt_jax.kernels.floats import accumulate_dtype

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_FEW_POSITIONS = 4
_FEW_CHANNELS = 16
_FEW_INPUTS = 32


def _tap_slices(x: jax.Array, window: Window) -> list[jax.Array]:
    """For each tap of the window, the input entries it meets, ``[N, H', W', C]``."""
    n, h, w, c = x.shape
    out_h, out_w = window.output_size((h, w))
    (top, bottom), (left, right) = window.padding
    padded = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    down, across = window.strides
    return [
        lax.slice(
            padded,
            (0, i, j, 0),
            (n, i + (out_h - 1) * down + 1, j + (out_w - 1) * across + 1, c),
            (1, down, across, 1),
        )
        for i in range(window.size[0])
        for j in range(window.size[1])
    ]


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot(a, b, preferred_element_type=accumulate_dtype(a, b))


def conv(x: jax.Array, w: jax.Array, *, window: Window, platform: str) -> jax.Array:
    """Convolution of ``x[N, H, W, C]`` with ``w[kh, kw, C, O]``, summed in float32 or better."""
    n, h, width, c = x.shape
    out_h, out_w = window.output_size((h, width))
    if x.size == 0 or w.size == 0:
        return jnp.zeros((n, out_h, out_w, w.shape[3]), accumulate_dtype(x, w))
    if window.is_dense:
        return _dot(x.reshape(-1, c), w.reshape(c, -1)).reshape(n, h, width, -1)
    is_small = out_h * out_w <= _FEW_POSITIONS or window.size[0] * window.size[1] * c <= _FEW_INPUTS
    if platform == "cpu" and is_small:
        columns = jnp.concatenate(_tap_slices(x, window), axis=-1)
        flat = _dot(columns.reshape(n * out_h * out_w, -1), w.reshape(-1, w.shape[3]))
        return flat.reshape(n, out_h, out_w, -1)
    return lax.conv_general_dilated(
        x,
        w,
        window.strides,
        window.padding,
        dimension_numbers=_DIMENSIONS,
        preferred_element_type=accumulate_dtype(x, w),
    )


def conv_input_grad(
    g: jax.Array, w: jax.Array, *, window: Window, input_size: Pair, platform: str
) -> jax.Array:
    """Transpose of :func:`conv` in its first argument: ``[N, H, W, C]``."""
    n, out_h, out_w, o = g.shape
    h, width = input_size
    c = w.shape[2]
    dtype = accumulate_dtype(g, w)
    if g.size == 0 or w.size == 0:
        return jnp.zeros((n, h, width, c), dtype)
    if window.is_dense:
        return _dot(g.reshape(-1, o), w.reshape(c, o).T).reshape(n, h, width, c)
    (top, bottom), (left, right) = window.padding
    (down, across), (kh, kw) = window.strides, window.size
    if platform == "cpu" and out_h * out_w <= _FEW_POSITIONS:
        columns = _dot(g.reshape(-1, o), w.transpose(3, 0, 1, 2).reshape(o, -1))
        columns = columns.reshape(n, out_h, out_w, kh, kw, c)
        padded_h, padded_w = h + top + bottom, width + left + right
        total = jnp.zeros((n, padded_h, padded_w, c), dtype)
        for i in range(kh):
            for j in range(kw):
                last_i, last_j = i + (out_h - 1) * down, j + (out_w - 1) * across
                total = total + lax.pad(
                    columns[:, :, :, i, j],
                    jnp.zeros((), dtype),
                    (
                        (0, 0, 0),
                        (i, padded_h - 1 - last_i, down - 1),
                        (j, padded_w - 1 - last_j, across - 1),
                        (0, 0, 0),
                    ),
                )
        return total[:, top : top + h, left : left + width]
    # The rows that the window never reached, because the strides left a remainder, get zero.
    rest_h = h + top + bottom - kh - (out_h - 1) * down
    rest_w = width + left + right - kw - (out_w - 1) * across
    return lax.conv_general_dilated(
        g,
        w[::-1, ::-1].transpose(0, 1, 3, 2),
        (1, 1),
        ((kh - 1 - top, kh - 1 - bottom + rest_h), (kw - 1 - left, kw - 1 - right + rest_w)),
        lhs_dilation=window.strides,
        dimension_numbers=_DIMENSIONS,
        preferred_element_type=dtype,
    )


def conv_weight_grad(x: jax.Array, g: jax.Array, *, window: Window, platform: str) -> jax.Array:
    """Transpose of :func:`conv` in its second argument: ``[kh, kw, C, O]``."""
    c = x.shape[3]
    o = g.shape[3]
    shape = (*window.size, c, o)
    dtype = accumulate_dtype(x, g)
    if x.size == 0 or g.size == 0:
        return jnp.zeros(shape, dtype)
    flat_g = g.reshape(-1, o)
    if platform == "cpu" or window.is_dense:
        taps = _tap_slices(x, window)
        if c < _FEW_CHANNELS:
            taps = [jnp.concatenate(taps, axis=-1)]
        products = [_dot(tap.reshape(-1, tap.shape[3]).T, flat_g) for tap in taps]
        return jnp.stack(products).reshape(shape)
    (top, _), (left, _) = window.padding
    (down, across), (kh, kw) = window.strides, window.size
    need_h = kh + (g.shape[1] - 1) * down - x.shape[1] - top
    need_w = kw + (g.shape[2] - 1) * across - x.shape[2] - left
    return lax.conv_general_dilated(
        x,
        g,
        (1, 1),
        ((top, need_h), (left, need_w)),
        rhs_dilation=window.strides,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=dtype,
    )
