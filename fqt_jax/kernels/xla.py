"""Exact integer products on XLA's own dot and convolution: the reference, on every backend.

Signs and codes travel in a small float type that holds them exactly (float32 on the CPU, where
it is the fastest; bfloat16 elsewhere, for the matrix units) and are summed in float32. Integers
up to 2^24 are exact there, so a contraction that could exceed this is cut into parts whose sums are
added as ``int32``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fqt_jax.binarize import PackedBits
from fqt_jax.kernels.contract import Pair, Rounding, UnsupportedError, Window, sum_dtype
from fqt_jax.kernels.float_conv import conv, conv_input_grad, conv_weight_grad
from fqt_jax.pruning import Selection
from fqt_jax.rounding import code_scale, flat_index, round_to_codes

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
    g: jax.Array, w: PackedBits, rounding: Rounding | None, window: Window, input_size: Pair
) -> jax.Array:
    """See :func:`fqt_jax.kernels.input_grad`."""
    if rounding is None:
        return conv_input_grad(g, w.signs(jnp.float32), window, input_size)
    codes = gradient_codes(g, rounding)
    signs = w.signs(_carrier())
    step = _per_sample(rounding.value_range / _top(rounding))
    lo = _per_sample(rounding.lo)
    # Sum of the weights' signs that meet each input entry: what the zero point is multiplied by.
    ones = jnp.ones((1, *g.shape[1:]), _carrier())
    sign_sums = conv_input_grad(ones, signs, window, input_size)
    sums = _exact_input_grad(codes, signs, rounding.bits, window, input_size)
    kept = step * sums.astype(jnp.float32) + lo * sign_sums
    if rounding.samples is None:
        return kept
    kept = _weighted(kept, _per_sample(rounding.samples.weights))
    zeros = jnp.zeros((g.shape[0], *kept.shape[1:]), jnp.float32)
    return zeros.at[rounding.samples.indices].set(kept, unique_indices=True, mode="drop")


def weight_grad(
    g: jax.Array, x: PackedBits, rounding: Rounding | None, window: Window
) -> jax.Array:
    """See :func:`fqt_jax.kernels.weight_grad`."""
    if rounding is None:
        return conv_weight_grad(x.signs(jnp.float32), g, window)
    if rounding.groups == "samples":
        return _emulated_weight_grad(g, x, rounding, window)
    codes = gradient_codes(g, rounding)
    signs = _take(x, rounding.samples).signs(_carrier())
    if rounding.samples is not None:
        # A slot with weight zero is a dropped sample: it must not even meet the zero point.
        signs = jnp.where(_per_sample(rounding.samples.weights) == 0, jnp.zeros_like(signs), signs)
    step = rounding.value_range / _top(rounding)
    ones = jnp.ones((*codes.shape[:3], 1), _carrier())
    sign_sums = _exact_weight_grad(signs, ones, 1, window)
    sums = _exact_weight_grad(signs, codes.astype(_carrier()), rounding.bits, window)
    kept = step.reshape(1, 1, 1, -1) * sums.astype(jnp.float32)
    kept = kept + rounding.lo.reshape(1, 1, 1, -1) * sign_sums.astype(jnp.float32)
    if rounding.channels is None:
        return kept
    kept = _weighted(kept, rounding.channels.weights.reshape(1, 1, 1, -1))
    zeros = jnp.zeros((*kept.shape[:3], g.shape[3]), jnp.float32)
    return zeros.at[..., rounding.channels.indices].set(kept, unique_indices=True, mode="drop")


def _emulated_weight_grad(
    g: jax.Array, x: PackedBits, rounding: Rounding, window: Window
) -> jax.Array:
    """Per-sample scales lie inside the sum over samples, so the product is one of floats."""
    if rounding.channels is not None:
        raise UnsupportedError("groups of samples do not go with pruned channels")
    codes = gradient_codes(g, rounding).astype(jnp.float32)
    kept = _per_sample(rounding.lo) + codes * _per_sample(rounding.value_range / _top(rounding))
    if rounding.samples is not None:
        kept = _weighted(kept, _per_sample(rounding.samples.weights))
    return conv_weight_grad(_take(x, rounding.samples).signs(jnp.float32), kept, window)


def gradient_codes(g: jax.Array, rounding: Rounding) -> jax.Array:
    """Codes of the kept entries, ``int32[kept samples, H', W', kept channels]``."""
    index = flat_index(g.shape)
    if rounding.samples is not None:
        g, index = (jnp.take(a, rounding.samples.indices, axis=0, mode="clip") for a in (g, index))
    if rounding.channels is not None:
        g, index = (jnp.take(a, rounding.channels.indices, axis=3, mode="clip") for a in (g, index))
    scale = code_scale(rounding.value_range, rounding.bits)
    if rounding.groups == "samples":
        lo, scale = _per_sample(rounding.lo), _per_sample(scale)
    else:
        lo, scale = rounding.lo.reshape(1, 1, 1, -1), scale.reshape(1, 1, 1, -1)
        if rounding.samples is not None:
            # (g * weight - lo) * scale, written as a subtraction followed by one product. XLA
            # turns a division by a broadcast into a product with the inverse, where it sees one:
            # with the inverse written out, the codes are the same everywhere.
            weight = _per_sample(rounding.samples.weights)
            lo, scale = lo * (1 / weight), scale * weight
    return round_to_codes(g, lo, scale, rounding.seed, index, rounding.bits)


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
    if terms * codes.shape[0] >= 2**31:
        raise UnsupportedError(f"sums over {codes.shape[:3]} codes of {bits} bits exceed int32")
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


def _top(rounding: Rounding) -> jax.Array:
    return jnp.float32((1 << rounding.bits) - 1)


def _per_sample(a: jax.Array) -> jax.Array:
    return lax.reshape(a, (a.shape[0], 1, 1, 1))


def _weighted(kept: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.where(weights == 0, jnp.float32(0), weights * kept)


def _take(x: PackedBits, samples: Selection | None) -> PackedBits:
    if samples is None:
        return x
    return PackedBits(jnp.take(x.words, samples.indices, axis=0, mode="clip"), x.shape)
