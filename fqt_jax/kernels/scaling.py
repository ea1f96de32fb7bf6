"""From a gradient to codes, and from integer sums back to a gradient: what implementations share.

An implementation turns ``g`` into :func:`gradient_codes`, sums signs times codes exactly, and hands
the sums to :func:`scale_input_grad` or :func:`scale_weight_grad` together with the sums of the
signs alone, which the zero point multiplies::

    sum(sign * (lo + step * code)) = step * sum(sign * code) + lo * sum(sign)
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fqt_jax.binarize import PackedBits
from fqt_jax.kernels.contract import Pair, Rounding, Window, exceeds_int32
from fqt_jax.rounding import code_scale, flat_index, round_to_codes
from fqt_jax.selection import Selection


def per_sample(a: jax.Array) -> jax.Array:
    """``a[N]`` as ``[N, 1, 1, 1]``."""
    return lax.reshape(a, (a.shape[0], 1, 1, 1))


def code_step(rounding: Rounding) -> jax.Array:
    """What one code is worth in each group: ``R / (2^b - 1)``."""
    return rounding.value_range / jnp.float32((1 << rounding.bits) - 1)


def code_grid(rounding: Rounding) -> tuple[jax.Array, jax.Array]:
    """Zero point and fixed-point scale of the kept entries.

    A folded weight enters as ``(g - lo * (1 / weight)) * (scale * weight)``: a subtraction followed
    by one product, like everywhere. XLA turns a division by a broadcast into a product with the
    inverse, where it sees one; with the inverse written out, the codes are the same everywhere.

    Returns:
      ``lo`` and ``scale``, each broadcastable to ``[kept samples, 1, 1, kept channels]``.
    """
    lo, scale = rounding.lo, code_scale(rounding.value_range, rounding.bits)
    if rounding.groups == "samples":
        return per_sample(lo), per_sample(scale)
    lo, scale = lo.reshape(1, 1, 1, -1), scale.reshape(1, 1, 1, -1)
    if rounding.samples is not None:
        weight = per_sample(rounding.samples.weights)
        lo, scale = lo * (1 / weight), scale * weight
    return lo, scale


def gradient_codes(g: jax.Array, rounding: Rounding) -> jax.Array:
    """Codes of the kept entries, ``int32[kept samples, H', W', kept channels]``."""
    index = flat_index(g.shape)
    if rounding.samples is not None:
        g, index = (jnp.take(a, rounding.samples.indices, axis=0, mode="clip") for a in (g, index))
    if rounding.channels is not None:
        g, index = (jnp.take(a, rounding.channels.indices, axis=3, mode="clip") for a in (g, index))
    lo, scale = code_grid(rounding)
    return round_to_codes(g, lo, scale, rounding.seed, index, rounding.bits)


def kept_values(g: jax.Array, rounding: Rounding) -> jax.Array:
    """What the codes of the kept entries stand for, weights included, by the definition in
    :class:`~fqt_jax.kernels.contract.Rounding`; of the shape of :func:`gradient_codes`.
    """
    lo, step = rounding.lo, code_step(rounding)
    own: Selection | None = getattr(rounding, rounding.groups)
    if rounding.groups == "samples":
        lo, step = per_sample(lo), per_sample(step)
        weights = None if own is None else per_sample(own.weights)
    else:
        lo, step = lo.reshape(1, 1, 1, -1), step.reshape(1, 1, 1, -1)
        weights = None if own is None else own.weights.reshape(1, 1, 1, -1)
    values = lo + step * gradient_codes(g, rounding).astype(jnp.float32)
    if weights is not None:
        return weighted(values, weights)
    if rounding.samples is not None:  # their weights were folded in before rounding
        is_dropped = per_sample(rounding.samples.weights) == 0
        return jnp.where(is_dropped, jnp.float32(0), values)
    return values


def quantized(g: jax.Array, rounding: Rounding) -> jax.Array:
    """The quantized gradient in float, of the shape of ``g``; zero where it was dropped."""
    values = kept_values(g, rounding)
    for axis, kept in ((0, rounding.samples), (3, rounding.channels)):
        if kept is not None:
            shape = tuple(g.shape[a] if a == axis else n for a, n in enumerate(values.shape))
            at = (slice(None),) * axis + (kept.indices,)
            zeros = jnp.zeros(shape, jnp.float32)
            values = zeros.at[at].set(values, unique_indices=True, mode="drop")
    return values


def kept_positions(g: jax.Array, rounding: Rounding) -> int:
    """Over how many entries of each channel the weight gradient sums."""
    samples = g.shape[0] if rounding.samples is None else rounding.samples.indices.shape[0]
    return samples * g.shape[1] * g.shape[2]


def declines_input_grad(
    g: jax.Array, w: PackedBits, rounding: Rounding | None, mask: Any, *, window: Window, **_: Any
) -> str | None:
    """Why an input gradient is no sum of integers that fits in 32 bits; ``None`` where it is."""
    if rounding is None:
        return "a gradient that is not rounded is a product of floats"
    return exceeds_int32(math.prod(window.size) * w.shape[3], rounding.bits)


def declines_weight_grad(
    g: jax.Array, x: PackedBits, rounding: Rounding | None, **_: Any
) -> str | None:
    """Why a weight gradient is no sum of integers that fits in 32 bits; ``None`` where it is."""
    if rounding is None:
        return "a gradient that is not rounded is a product of floats"
    if rounding.groups == "samples":
        return "the scale of a group of samples lies inside the sum"
    return exceeds_int32(kept_positions(g, rounding), rounding.bits)


def declines_samplewise_weight_grad(rounding: Rounding) -> str | None:
    """Why a weight gradient whose groups are samples is no product of floats either."""
    pruned = "groups of samples do not go with pruned channels"
    return None if rounding.channels is None else pruned


def take(x: PackedBits, samples: Selection | None) -> PackedBits:
    """The kept samples of ``x``."""
    if samples is None:
        return x
    return PackedBits(jnp.take(x.words, samples.indices, axis=0, mode="clip"), x.shape)


def tap_validity(size: Pair, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Which taps of the window meet the image, at each output row and at each output column.

    Returns:
      ``bool[H', kh]`` and ``bool[W', kw]``.
    """
    valid = []
    for axis, n_out in enumerate(window.output_size(size)):
        start = np.arange(n_out)[:, None] * window.strides[axis] - window.padding[axis][0]
        source = start + np.arange(window.size[axis])[None, :]
        valid.append((source >= 0) & (source < size[axis]))
    return valid[0], valid[1]


def input_sign_sums(w: PackedBits, window: Window, input_size: Pair) -> jax.Array:
    """Sum of the weights' signs that meet each input entry, ``int32[1, H, W, C]``."""
    by_tap = jnp.sum(w.signs(jnp.int32), axis=3)
    meets = []
    for axis, n_out in enumerate(window.output_size(input_size)):
        # Input row h meets tap i where h = s * h' + i - before for an output row h'.
        offset = np.arange(input_size[axis])[:, None] + window.padding[axis][0]
        offset = offset - np.arange(window.size[axis])[None, :]
        row, rest = np.divmod(offset, window.strides[axis])
        meets.append(((rest == 0) & (row >= 0) & (row < n_out)).astype(np.int32))
    return jnp.einsum("hi,wj,ijc->hwc", meets[0], meets[1], by_tap)[None]


def weight_sign_sums(x: PackedBits, samples: Selection | None, window: Window) -> jax.Array:
    """Sum of the input's signs that meet each weight, ``int32[kh, kw, C, 1]``.

    ``x`` holds the kept samples; those with weight zero are dropped and do not count.
    """
    h, w, c = x.shape
    signs = x.signs(jnp.int8)
    if samples is not None:
        signs = jnp.where(per_sample(samples.weights) == 0, jnp.zeros_like(signs), signs)
    total = jnp.sum(signs, axis=0, dtype=jnp.int32)
    rows, columns = (_tap_sources((h, w), window, axis) for axis in (0, 1))
    return jnp.einsum("ih,jw,hwc->ijc", rows, columns, total).reshape(*window.size, c, 1)


def _tap_sources(size: Pair, window: Window, axis: int) -> np.ndarray:
    """``int32[k, n]``: how many output rows read input row ``n`` through tap ``k``."""
    counts = np.zeros((window.size[axis], size[axis]), np.int32)
    starts = np.arange(window.output_size(size)[axis]) * window.strides[axis]
    for tap in range(window.size[axis]):
        source = starts + tap - window.padding[axis][0]
        counts[tap, source[(source >= 0) & (source < size[axis])]] = 1
    return counts


def masked(dx: jax.Array, mask: PackedBits | None) -> jax.Array:
    """Zero where the mask's bit is clear."""
    return dx if mask is None else jnp.where(mask.unpack(), dx, jnp.float32(0))


def scale_input_grad(
    sums: jax.Array,
    sign_sums: jax.Array,
    rounding: Rounding,
    n_samples: int,
    mask: PackedBits | None,
    compact: bool,
) -> jax.Array:
    """The input gradient from its integer sums; samples that were not kept get zero.

    Args:
      sums: ``int32[kept samples, H, W, C]``.
      sign_sums: ``[1, H, W, C]``.
      rounding: groups of samples.
      n_samples: the number of samples of the whole batch.
      mask: entries whose bit is clear get zero.
      compact: leave the samples out that were not kept.
    """
    kept = per_sample(code_step(rounding)) * sums.astype(jnp.float32)
    kept = kept + per_sample(rounding.lo) * sign_sums.astype(jnp.float32)
    if rounding.samples is None:
        return masked(kept, mask)
    kept = weighted(kept, per_sample(rounding.samples.weights))
    kept = masked(kept, mask and take(mask, rounding.samples))
    if compact:
        return kept
    zeros = jnp.zeros((n_samples, *kept.shape[1:]), jnp.float32)
    return zeros.at[rounding.samples.indices].set(kept, unique_indices=True, mode="drop")


def scale_weight_grad(
    sums: jax.Array, sign_sums: jax.Array, rounding: Rounding, n_channels: int
) -> jax.Array:
    """The weight gradient from its integer sums; channels that were not kept get zero.

    Args:
      sums: ``int32[kh, kw, C, kept channels]``.
      sign_sums: ``[kh, kw, C, 1]``.
      rounding: groups of channels.
      n_channels: the number of output channels.
    """
    kept = code_step(rounding).reshape(1, 1, 1, -1) * sums.astype(jnp.float32)
    kept = kept + rounding.lo.reshape(1, 1, 1, -1) * sign_sums.astype(jnp.float32)
    if rounding.channels is None:
        return kept
    kept = weighted(kept, rounding.channels.weights.reshape(1, 1, 1, -1))
    zeros = jnp.zeros((*kept.shape[:3], n_channels), jnp.float32)
    return zeros.at[..., rounding.channels.indices].set(kept, unique_indices=True, mode="drop")


def weighted(kept: jax.Array, weights: jax.Array) -> jax.Array:
    """``weights * kept``, and exactly zero, NaN or not, where the weight is zero."""
    return jnp.where(weights == 0, jnp.float32(0), weights * kept)
