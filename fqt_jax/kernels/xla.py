"""Exact integer products on XLA's own dot and convolution: the reference, on every backend.

Signs and codes travel in a small float type that holds them exactly (float32 on the CPU, where
it is the fastest; bfloat16 elsewhere, for the matrix units) and are summed in float32. Integers
up to 2^24 are exact there, so a contraction that could exceed this is cut into parts whose sums are
added as ``int32``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fqt_jax.binarize import PackedBits
from fqt_jax.kernels.contract import (
    Pair,
    Rounding,
    UnsupportedError,
    Window,
    check_int32_sums,
    sum_dtype,
)
from fqt_jax.kernels.float_conv import conv, conv_input_grad, conv_weight_grad
from fqt_jax.kernels.scaling import (
    code_step,
    gradient_codes,
    input_sign_sums,
    masked,
    per_sample,
    scale_input_grad,
    scale_weight_grad,
    take,
    weight_sign_sums,
    weighted,
)

_EXACT = 2**24


def unavailable() -> str | None:
    """Why this implementation cannot run here; ``None`` when it can."""
    return None


def _carrier() -> jnp.dtype:
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def forward(x: PackedBits, w: PackedBits, window: Window) -> jax.Array:
    """See :func:`fqt_jax.kernels.forward`."""
    z = conv(x.signs(_carrier()), w.signs(_carrier()), window)
    kh, kw, c, _ = w.shape
    return z.astype(sum_dtype(kh * kw * c))


def input_grad(
    g: jax.Array,
    w: PackedBits,
    rounding: Rounding | None,
    window: Window,
    input_size: Pair,
    mask: PackedBits | None = None,
    compact: bool = False,
) -> jax.Array:
    """See :func:`fqt_jax.kernels.input_grad`."""
    if rounding is None:
        return masked(conv_input_grad(g, w.signs(jnp.float32), window, input_size), mask)
    codes = gradient_codes(g, rounding)
    sums = _exact_input_grad(codes, w.signs(_carrier()), rounding.bits, window, input_size)
    sign_sums = input_sign_sums(w, window, input_size)
    return scale_input_grad(sums, sign_sums, rounding, g.shape[0], mask, compact)


def weight_grad(
    g: jax.Array, x: PackedBits, rounding: Rounding | None, window: Window
) -> jax.Array:
    """See :func:`fqt_jax.kernels.weight_grad`."""
    if rounding is None:
        return conv_weight_grad(x.signs(jnp.float32), g, window)
    if rounding.groups == "samples":
        return _emulated_weight_grad(g, x, rounding, window)
    codes = gradient_codes(g, rounding)
    kept = take(x, rounding.samples)
    signs = kept.signs(_carrier())
    if rounding.samples is not None:
        # A slot with weight zero is a dropped sample: it must not even meet the zero point.
        signs = jnp.where(per_sample(rounding.samples.weights) == 0, jnp.zeros_like(signs), signs)
    sums = _exact_weight_grad(signs, codes.astype(_carrier()), rounding.bits, window)
    sign_sums = weight_sign_sums(kept, rounding.samples, window)
    return scale_weight_grad(sums, sign_sums, rounding, g.shape[3])


def _emulated_weight_grad(
    g: jax.Array, x: PackedBits, rounding: Rounding, window: Window
) -> jax.Array:
    """Per-sample scales lie inside the sum over samples, so the product is one of floats."""
    if rounding.channels is not None:
        raise UnsupportedError("groups of samples do not go with pruned channels")
    codes = gradient_codes(g, rounding).astype(jnp.float32)
    kept = per_sample(rounding.lo) + codes * per_sample(code_step(rounding))
    if rounding.samples is not None:
        kept = weighted(kept, per_sample(rounding.samples.weights))
    return conv_weight_grad(take(x, rounding.samples).signs(jnp.float32), kept, window)


def _exact_input_grad(
    codes: jax.Array, signs: jax.Array, bits: int, window: Window, input_size: Pair
) -> jax.Array:
    """Integer sums, in parts over the output channels where they could exceed 2^24."""
    codes = codes.astype(signs.dtype)
    terms = signs.shape[0] * signs.shape[1] * ((1 << bits) - 1)
    part = max(1, (_EXACT - 1) // terms)
    sums = [
        conv_input_grad(codes[..., i : i + part], signs[..., i : i + part], window, input_size)
        for i in range(0, codes.shape[3], part)
    ]
    return _add_parts(sums, (codes.shape[0], *input_size, signs.shape[2]))


def _exact_weight_grad(signs: jax.Array, codes: jax.Array, bits: int, window: Window) -> jax.Array:
    """Integer sums, in parts over the samples where they could exceed 2^24."""
    terms = codes.shape[1] * codes.shape[2] * ((1 << bits) - 1)
    check_int32_sums(math.prod(codes.shape[:3]), bits)
    part = max(1, (_EXACT - 1) // max(1, terms))
    sums = [
        conv_weight_grad(signs[i : i + part], codes[i : i + part], window)
        for i in range(0, codes.shape[0], part)
    ]
    return _add_parts(sums, (*window.size, signs.shape[3], codes.shape[3]))


def _add_parts(parts: list[jax.Array], shape: tuple[int, ...]) -> jax.Array:
    total = jnp.zeros(shape, jnp.int32)
    for part in parts:
        total = total + part.astype(jnp.int32)
    return total
