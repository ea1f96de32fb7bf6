"""Plain NumPy versions of what the library computes, in float64 and int64, to compare against.

Written from the definitions, for clarity and not for speed. Only the hash and the codes use the
narrow types of the library, because there the bits themselves are specified.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Pads = tuple[tuple[int, int], tuple[int, int]]


# Bits and words


def pack(bits: np.ndarray, batch_ndim: int) -> np.ndarray:
    """Bit ``i`` of a row goes to word ``i // 32``, position ``i % 32``."""
    batch = bits.shape[:batch_ndim]
    rows = bits.reshape(math.prod(batch), math.prod(bits.shape[batch_ndim:]))
    words = np.zeros((rows.shape[0], -(-rows.shape[1] // 32)), np.uint32)
    for row, column in np.argwhere(rows):
        words[row, column // 32] |= np.uint32(1 << (column % 32))
    return words.reshape(*batch, words.shape[1])


def signs(x: np.ndarray) -> np.ndarray:
    return np.where(np.asarray(x, np.float64) >= 0, 1, -1).astype(np.int64)


# Convolutions


def same_padding(size: tuple[int, int], kernel: tuple[int, int], strides: tuple[int, int]) -> Pads:
    pads = []
    for n, k, s in zip(size, kernel, strides, strict=True):
        total = max((math.ceil(n / s) - 1) * s + k - n, 0)
        pads.append((total // 2, total - total // 2))
    return pads[0], pads[1]


def _windows(x: np.ndarray, kernel, strides, padding: Pads) -> np.ndarray:
    """``[N, H', W', C, kh, kw]``: what each output position sees, zeros where it sees padding."""
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    return sliding_window_view(padded, kernel, axis=(1, 2))[:, :: strides[0], :: strides[1]]


def conv(x: np.ndarray, w: np.ndarray, strides, padding: Pads) -> np.ndarray:
    return np.einsum("nhwcij,ijco->nhwo", _windows(x, w.shape[:2], strides, padding), w)


def conv_weight_grad(x: np.ndarray, g: np.ndarray, kernel, strides, padding: Pads) -> np.ndarray:
    return np.einsum("nhwcij,nhwo->ijco", _windows(x, kernel, strides, padding), g)


def conv_input_grad(g: np.ndarray, w: np.ndarray, strides, padding: Pads, input_size) -> np.ndarray:
    (top, bottom), (left, right) = padding
    h, width = input_size
    kh, kw, c, _ = w.shape
    dtype = np.result_type(g, w)
    total = np.zeros((g.shape[0], h + top + bottom, width + left + right, c), dtype)
    for p in range(g.shape[1]):
        for q in range(g.shape[2]):
            i, j = p * strides[0], q * strides[1]
            total[:, i : i + kh, j : j + kw] += np.einsum("no,ijco->nijc", g[:, p, q], w)
    return total[:, top : top + h, left : left + width]


# Rounding


def counter_bits(seed: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The integer hash, in Python integers of unlimited size reduced modulo 2^32."""
    first, second = (int(s) for s in seed)
    out = []
    for counter in np.asarray(index).reshape(-1).tolist():
        v = counter ^ first
        v = (v ^ (v >> 16)) * 0x21F0AAAD % 2**32
        v ^= second
        v = (v ^ (v >> 15)) * 0x735A2D97 % 2**32
        out.append(v ^ (v >> 15))
    return np.array(out, np.uint32).reshape(np.shape(index))


def codes(g, lo, scale, seed, index, bits: int) -> np.ndarray:
    """``(clip(int32((g - lo) * s)) + u) >> 16`` with the difference and product in float32."""
    with np.errstate(invalid="ignore", over="ignore"):
        fixed = (np.float32(1) * g - lo).astype(np.float32) * np.asarray(scale, np.float32)
    fixed = np.clip(np.nan_to_num(fixed, nan=0.0), 0, (2**bits - 1) * 65536)
    noise = (counter_bits(seed, index) >> np.uint32(16)).astype(np.int64)
    return (np.trunc(fixed).astype(np.int64) + noise) >> 16


def code_scale(value_range, bits: int) -> np.ndarray:
    return np.float32((2**bits - 1) * 65536) / np.asarray(value_range, np.float32)


def zero_grid(lo: float, hi: float, bits: int) -> tuple[float, float]:
    """Tries every number of steps below zero: the lowest level and the range of the finest."""
    steps = 2**bits - 1
    finest = np.inf, 0
    for below in range(steps + 1):
        sides = ((max(-lo, 0.0), below), (max(hi, 0.0), steps - below))
        step = max(side / n if n else (np.inf if side > 0 else 0.0) for side, n in sides)
        finest = min(finest, (step, below))
    step, below = finest
    return -below * step, steps * step


def quantized(g: np.ndarray, rounding) -> tuple[np.ndarray, np.ndarray]:
    """The codes and the quantized gradient, both of the shape of ``g``, zero where dropped.

    ``rounding`` has the attributes of ``fqt_jax.kernels.Rounding``. The weights of the axis that
    is not the groups' are folded into ``g``: ``(g - lo * (1 / weight)) * (s * weight)``.
    """
    g = np.asarray(g, np.float32)
    n, _, _, o = g.shape
    top = 2**rounding.bits - 1
    kept, weights = {}, {}
    for axis, size in (("samples", n), ("channels", o)):
        selection = getattr(rounding, axis)
        kept[axis] = np.arange(size) if selection is None else np.asarray(selection.indices)
        weights[axis] = (
            np.ones(size, np.float32) if selection is None else np.asarray(selection.weights)
        )
    by_sample = rounding.groups == "samples"
    shape = (-1, 1, 1, 1) if by_sample else (1, 1, 1, -1)
    other_shape = (1, 1, 1, -1) if by_sample else (-1, 1, 1, 1)
    own = weights["samples" if by_sample else "channels"].reshape(shape)
    other = weights["channels" if by_sample else "samples"].reshape(other_shape)
    lo = np.asarray(rounding.lo, np.float32).reshape(shape)
    value_range = np.asarray(rounding.value_range, np.float32).reshape(shape)
    block = np.ix_(kept["samples"], range(g.shape[1]), range(g.shape[2]), kept["channels"])
    index = np.arange(g.size).reshape(g.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        folded_lo = lo * (np.float32(1) / other)
        folded_scale = code_scale(value_range, rounding.bits) * other
        q = codes(g[block], folded_lo, folded_scale, rounding.seed, index[block], rounding.bits)
        value = lo.astype(np.float64) + q * (value_range.astype(np.float64) / top)
        value = np.where((own == 0) | (other == 0), 0.0, own.astype(np.float64) * value)
    all_codes, all_values = np.zeros(g.shape, np.int64), np.zeros(g.shape)
    all_codes[block], all_values[block] = q, value
    return all_codes, all_values


# Pruning


def keep_probabilities(importance: np.ndarray, k: int) -> np.ndarray:
    """Bisection on the logarithm of ``c`` in ``sum(min(1, c r)) = k``."""
    r = np.asarray(importance, np.float64)
    n, positive = r.size, int((r > 0).sum())
    if k == 0:
        return np.zeros(n)
    if positive <= k:
        return np.where(r > 0, 1.0, (k - positive) / max(n - positive, 1))
    low, high = -300.0, 300.0
    for _ in range(200):
        middle = (low + high) / 2
        if np.minimum(1, np.exp(middle) * r).sum() < k:
            low = middle
        else:
            high = middle
    return np.minimum(1, np.exp(high) * r)


# Variances


def rounding_variance(
    g: np.ndarray, bits: int, group_axis: int | None, grid: str = "range"
) -> np.ndarray:
    """``(R / B)^2 f (1 - f)`` of each entry, for groups along one axis or the whole array."""
    g = np.asarray(g, np.float64)
    reduced = tuple(a for a in range(g.ndim) if a != group_axis)
    lo, hi = g.min(axis=reduced, keepdims=True), g.max(axis=reduced, keepdims=True)
    value_range = hi - lo
    if grid == "zero":
        lo, value_range = np.vectorize(zero_grid)(lo, hi, bits)
    step = value_range / (2**bits - 1)
    position = (g - lo) / np.where(step == 0, 1, step)
    fraction = position - np.floor(position)
    return step**2 * fraction * (1 - fraction)


def mask_variance(g: np.ndarray, p: np.ndarray) -> np.ndarray:
    """``(1 - p) / p g^2`` of each entry; ``p`` broadcasts against ``g``."""
    return (1 - p) / p * np.asarray(g, np.float64) ** 2


def pruned_rounded_variance(
    g: np.ndarray, p: np.ndarray, bits: int, group_axis: int, grid: str = "range"
) -> float:
    """``sum_i [SR_i / p_i + (1 - p_i) / p_i |g_i|^2]``."""
    shape = [1] * g.ndim
    shape[group_axis] = -1
    p = p.reshape(shape)
    rounding = rounding_variance(g, bits, group_axis, grid)
    return float((rounding / p + mask_variance(g, p)).sum())


# Statistics of repeated draws


def assert_mean(draws: np.ndarray, expected, variance=None, floor=0.0, errors: float = 4.0) -> None:
    """Every entry's mean over the first axis is within ``errors`` standard errors of ``expected``.

    The standard errors come from ``variance`` where it is known, else from the draws. ``floor`` is
    the resolution of the arithmetic, which no number of draws averages away.
    """
    draws = np.asarray(draws, np.float64)
    variance = draws.var(axis=0, ddof=1) if variance is None else variance
    allowed = errors * np.sqrt(variance / draws.shape[0]) + floor
    excess = np.abs(draws.mean(axis=0) - expected) - allowed
    assert excess.max() <= 0, f"mean is off by up to {excess.max():.3g} more than allowed"


def assert_total_variance(draws: np.ndarray, expected: float, rtol: float = 0.05) -> None:
    total = float(np.asarray(draws, np.float64).var(axis=0, ddof=1).sum())
    np.testing.assert_allclose(total, expected, rtol=rtol)


def convergence_slope(draws: np.ndarray, expected: np.ndarray) -> float:
    """Slope of log(error of the mean) against log(number of draws averaged).

    For each number of draws, the error is the root mean square over all disjoint blocks of them.
    """
    n = draws.shape[0]
    flat = np.asarray(draws, np.float64).reshape(n, -1) - np.asarray(expected).reshape(1, -1)
    counts = [2**i for i in range(int(math.log2(n)) - 1)]
    errors = []
    for count in counts:
        blocks = flat[: n // count * count].reshape(-1, count, flat.shape[1]).mean(axis=1)
        errors.append(math.sqrt((blocks**2).mean()))
    return float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


def numeric(value) -> np.ndarray:
    """An array of any JAX float type as float64."""
    return np.asarray(np.asarray(value).astype(np.float32), np.float64)
