"""A convolution that stays float, with the fastest gradients there are."""

from __future__ import annotations

import functools
from typing import Any

import jax

from fqt_jax import kernels
from fqt_jax.kernels.contract import Window


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def float_conv(x: jax.Array, w: jax.Array, window: Window, implementation: str | None) -> jax.Array:
    """Convolution of ``x[N, H, W, C]`` with ``w[kh, kw, C, O]``, of the type of ``x``."""
    y = kernels.float_conv(x, w.astype(x.dtype), window, implementation=implementation)
    return y.astype(x.dtype)


def _fwd(
    x: jax.Array, w: jax.Array, window: Window, implementation: str | None
) -> tuple[jax.Array, Any]:
    return float_conv(x, w, window, implementation), (x, w)


def _bwd(
    window: Window, implementation: str | None, residuals: Any, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    size = (x.shape[1], x.shape[2])
    dx = kernels.float_conv_input_grad(
        dy, w.astype(x.dtype), window, size, implementation=implementation
    )
    dw = kernels.float_conv_weight_grad(x, dy, window, implementation=implementation)
    return dx.astype(x.dtype), dw.astype(w.dtype)


float_conv.defvjp(_fwd, _bwd)
