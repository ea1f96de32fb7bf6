"""Exact integer products on XLA's own dot and convolution: the reference, on every backend.

Signs and codes travel in a small float type that holds them exactly (float32 on the CPU, where
it is the fastest; bfloat16 elsewhere, for the matrix units) and are summed in float32. Integers
up to 2^24 are exact there, so a contraction that could exceed this is cut into parts whose sums are
added as ``int32``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fqt_jax.binarize import PackedBits
from fqt_jax.kernels.contract import Pair, Rounding, Window, exceeds_int32, sum_dtype
from fqt_jax.kernels.scaling import (
    code_step,
    declines_samplewise_weight_grad,
    gradient_codes,
    input_sign_sums,
    kept_positions,
    masked,
    per_sample,
    scale_input_grad,
    scale_weight_grad,
    take,
    weight_sign_sums,
    weighted,
)
from fqt_jax.kernels.xla.float_conv import conv, conv_input_grad, conv_weight_grad

_EXACT = 2**24

Transpose = Callable[[jax.Array, jax.Array], jax.Array]
"""One of the two transposes of a convolution, of float operands."""


def _carrier(platform: str) -> jnp.dtype:
    return jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)


def forward(x: PackedBits, w: PackedBits, *, window: Window, platform: str) -> jax.Array:
    """See :func:`fqt_jax.kernels.forward`."""
    carrier = _carrier(platform)
    z = conv(x.signs(carrier), w.signs(carrier), window=window, platform=platform)
    kh, kw, c, _ = w.shape
    return z.astype(sum_dtype(kh * kw * c))


def input_grad(
    g: jax.Array,
    w: PackedBits,
    rounding: Rounding | None,
    mask: PackedBits | None,
    *,
    window: Window,
    input_size: Pair,
    compact: bool,
    platform: str,
) -> jax.Array:
    """See :func:`fqt_jax.kernels.input_grad`."""
    transpose = functools.partial(
        conv_input_grad, window=window, input_size=input_size, platform=platform
    )
    if rounding is None:
        return masked(transpose(g, w.signs(jnp.float32)), mask)
    codes = gradient_codes(g, rounding)
    sums = _exact_input_grad(codes, w.signs(_carrier(platform)), rounding.bits, transpose)
    sign_sums = input_sign_sums(w, window, input_size)
    return scale_input_grad(sums, sign_sums, rounding, g.shape[0], mask, compact)


def weight_grad(
    g: jax.Array, x: PackedBits, rounding: Rounding | None, *, window: Window, platform: str
) -> jax.Array:
    """See :func:`fqt_jax.kernels.weight_grad`."""
    transpose = functools.partial(conv_weight_grad, window=window, platform=platform)
    if rounding is None:
        return transpose(x.signs(jnp.float32), g)
    if rounding.groups == "samples":
        return _emulated_weight_grad(g, x, rounding, transpose)
    codes = gradient_codes(g, rounding)
    kept = take(x, rounding.samples)
    signs = kept.signs(_carrier(platform))
    if rounding.samples is not None:
        # A slot with weight zero is a dropped sample: it must not even meet the zero point.
        signs = jnp.where(per_sample(rounding.samples.weights) == 0, jnp.zeros_like(signs), signs)
    sums = _exact_weight_grad(signs, codes, rounding.bits, transpose)
    sign_sums = weight_sign_sums(kept, rounding.samples, window)
    return scale_weight_grad(sums, sign_sums, rounding, g.shape[3])


def declines_input_grad(
    g: jax.Array, w: PackedBits, rounding: Rounding | None, mask: Any, *, window: Window, **_: Any
) -> str | None:
    """Why an input gradient is not served."""
    if rounding is None:
        return None
    taps = math.prod(window.size)
    return _exceeds_exact(taps * ((1 << rounding.bits) - 1)) or exceeds_int32(
        taps * w.shape[3], rounding.bits
    )


def declines_weight_grad(
    g: jax.Array, x: PackedBits, rounding: Rounding | None, **_: Any
) -> str | None:
    """Why a weight gradient is not served."""
    if rounding is None:
        return None
    if rounding.groups == "samples":
        return declines_samplewise_weight_grad(rounding)
    return _exceeds_exact(g.shape[1] * g.shape[2]) or exceeds_int32(
        kept_positions(g, rounding), rounding.bits
    )


def _exceeds_exact(largest: int) -> str | None:
    return None if largest < _EXACT else "sums that cannot be cut into parts exceed 2^24"


def _emulated_weight_grad(
    g: jax.Array, x: PackedBits, rounding: Rounding, transpose: Transpose
) -> jax.Array:
    """Per-sample scales lie inside the sum over samples, so the product is one of floats."""
    codes = gradient_codes(g, rounding).astype(jnp.float32)
    kept = per_sample(rounding.lo) + codes * per_sample(code_step(rounding))
    if rounding.samples is not None:
        kept = weighted(kept, per_sample(rounding.samples.weights))
    return transpose(take(x, rounding.samples).signs(jnp.float32), kept)


def _exact_input_grad(
    codes: jax.Array, signs: jax.Array, bits: int, transpose: Transpose
) -> jax.Array:
    """Integer sums, in parts over the output channels where they could exceed 2^24."""
    codes = codes.astype(signs.dtype)
    terms = signs.shape[0] * signs.shape[1] * ((1 << bits) - 1)
    part = max(1, (_EXACT - 1) // terms)
    sums = [
        transpose(codes[..., i : i + part], signs[..., i : i + part])
        for i in range(0, max(1, codes.shape[3]), part)
    ]
    return _add_parts(sums)


def _exact_weight_grad(
    signs: jax.Array, codes: jax.Array, bits: int, transpose: Transpose
) -> jax.Array:
    """Integer sums, in parts over the samples where they could exceed 2^24.

    Where those of one sample could, the high and the low bits of its codes are summed apart.
    """
    terms = codes.shape[1] * codes.shape[2] * ((1 << bits) - 1)
    if terms >= _EXACT and bits > 1:
        low = bits // 2
        sums = [
            _exact_weight_grad(signs, part, width, transpose)
            for part, width in ((codes >> low, bits - low), (codes & ((1 << low) - 1), low))
        ]
        return (sums[0] << low) + sums[1]
    codes = codes.astype(signs.dtype)
    part = max(1, (_EXACT - 1) // max(1, terms))
    sums = [
        transpose(signs[i : i + part], codes[i : i + part])
        for i in range(0, max(1, codes.shape[0]), part)
    ]
    return _add_parts(sums)


def _add_parts(parts: list[jax.Array]) -> jax.Array:
    total = parts[0].astype(jnp.int32)
    for part in parts[1:]:
        total = total + part.astype(jnp.int32)
    return total
