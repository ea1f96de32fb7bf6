"""The kernels of the Pallas implementation: tiles of packed bits, unpacked next to the matrix unit.

A convolution is a product of matrices whose left one, a row for each position and a column for each
(tap, channel), is never built. On a GPU a tile of it is gathered from the image itself. A TPU
cannot gather, so there XLA lays the columns out beforehand, as packed bits or narrow codes, and
tiles are blocks of these; ``laid_out`` says which. Rounding to codes happens in the tile on a GPU,
in XLA's layout on a TPU.

Extents are powers of two and at least 16 where they enter a product. What sticks out of the image
or the operands is masked, so that sums need no correction.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fqt_jax.kernels.contract import Pair, Window
from fqt_jax.rounding import FRACTION_BITS, counter_bits


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static side of a kernel.

    Attributes:
      window: window of the forward convolution.
      input_size: ``(H, W)`` of its input.
      n: number of samples that take part.
      c: input channels.
      o: output channels that take part.
      bits: width of a code.
      lanes: entries of the contraction in one product.
      laid_out: whether columns were laid out beforehand.
    """

    window: Window
    input_size: Pair
    n: int
    c: int
    o: int
    bits: int
    lanes: int
    laid_out: bool

    @property
    def output_size(self) -> Pair:
        """``(H', W')`` of the forward convolution."""
        return self.window.output_size(self.input_size)

    @property
    def n_taps(self) -> int:
        """Entries of the window."""
        return self.window.size[0] * self.window.size[1]

    @property
    def n_bytes(self) -> int:
        """Bytes that hold the signs of a position."""
        return -(-self.c // 8)

    def _place(self, p: jax.Array, size: Pair) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Sample, row and column of position ``p``."""
        sample, rest = divide(p, size[0] * size[1])
        return sample, *divide(rest, size[1])

    def input_source(self, p: jax.Array, tap: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Flat input position that output position ``p`` sees through ``tap``, and if it exists."""
        sample, row, col = self._place(p, self.output_size)
        (top, _), (left, _) = self.window.padding
        i, j = divide(tap, self.window.size[1])
        h, w = self.input_size
        y = row * self.window.strides[0] + i - top
        x = col * self.window.strides[1] + j - left
        valid = (y >= 0) & (y < h) & (x >= 0) & (x < w) & (sample < self.n) & (tap < self.n_taps)
        return jnp.where(valid, (sample * h + y) * w + x, 0), valid

    def output_source(self, p: jax.Array, tap: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Sample and place in it of the output that input position ``p`` reached, last tap first.

        The third value says whether it exists.
        """
        sample, row, col = self._place(p, self.input_size)
        (top, _), (left, _) = self.window.padding
        kh, kw = self.window.size
        down, across = self.window.strides
        h, w = self.output_size
        i, j = divide(tap, kw)
        y, rest_y = divide(row + top - (kh - 1 - i), down)
        x, rest_x = divide(col + left - (kw - 1 - j), across)
        # The rest of a negative place is not positive: it must be zero and the place too.
        valid = (y >= 0) & (x >= 0) & (rest_y == 0) & (rest_x == 0)
        valid = valid & (y < h) & (x < w) & (sample < self.n) & (tap < self.n_taps)
        return jnp.where(valid, sample, 0), jnp.where(valid, y * w + x, 0), valid


def divide(a: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and rest of an array by a positive number, rounded towards zero."""
    if by == 1:
        return a, jnp.zeros_like(a)
    whole = jnp.full(a.shape, by, a.dtype)
    return lax.div(a, whole), lax.rem(a, whole)


def iota(start: Any, shape: tuple[int, int], axis: int) -> jax.Array:
    """``start, start + 1, ...`` along ``axis``."""
    return start + lax.broadcasted_iota(jnp.int32, shape, axis)


def signs_at(byte: jax.Array, bit: Any, valid: jax.Array | None = None) -> jax.Array:
    """+1 and -1 from one bit of each byte, zero where not ``valid``."""
    sign = 2 * ((byte >> bit) & 1) - 1
    return sign if valid is None else jnp.where(valid, sign, 0)


def exact_dot(a: jax.Array, b: jax.Array, carrier: Any) -> jax.Array:
    """Product of integers in a carrier that holds them, and whose sums over a tile are exact."""
    wide = jnp.int32 if carrier == jnp.int8 else jnp.float32
    a, b = (_as_carrier(v, carrier) for v in (a, b))
    dims = (((1,), (0,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=wide).astype(jnp.int32)


def _as_carrier(v: jax.Array, carrier: Any) -> jax.Array:
    # Integers reach bfloat16 by way of float32: not every target converts them directly.
    return v.astype(carrier) if carrier == jnp.int8 else v.astype(jnp.float32).astype(carrier)


def codes_at(
    g: jax.Array, lo: jax.Array, scale: jax.Array, seed: Any, index: jax.Array, bits: int
) -> jax.Array:
    """Codes as :func:`fqt_jax.rounding.round_to_codes` makes them, from a counter ``int32``.

    The clip comes before the conversion, which targets define differently outside ``int32``; NaN
    gives zero on every one of them.
    """
    top = jnp.float32(((1 << bits) - 1) << FRACTION_BITS)
    level = (g - lo) * scale
    level = jnp.where(level > 0, jnp.minimum(level, top), jnp.float32(0)).astype(jnp.int32)
    u = counter_bits(seed, index.astype(jnp.uint32)) >> (32 - FRACTION_BITS)
    return (level + u.astype(jnp.int32)) >> FRACTION_BITS


def _full(index: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jnp.broadcast_to(index, shape)


def forward_kernel(x_ref: Any, w_ref: Any, out_ref: Any, *, plan: Plan, carrier: Any) -> None:
    """``out[positions, O]`` of a block: signs of the input times signs of the weights."""
    rows, cols = out_ref.shape
    shape = (rows, plan.lanes)
    p = iota(pl.program_id(0) * rows, (rows, 1), 0)

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        at = pl.ds(pl.multiple_of(step * plan.lanes, plan.lanes), plan.lanes)
        k = iota(step * plan.lanes, (1, plan.lanes), 1)
        tap, byte = divide(k, plan.n_bytes)
        source, valid = plan.input_source(_full(p, shape), _full(tap, shape))
        x = x_ref[:, at] if plan.laid_out else x_ref[source, _full(byte, shape)]
        x, w = x.astype(jnp.int32), w_ref[at, :].astype(jnp.int32)
        for bit in range(8):
            known = valid & (byte * 8 + bit < plan.c)
            total = total + exact_dot(signs_at(x, bit, known), signs_at(w, bit), carrier)
        return total

    n_steps = w_ref.shape[0] // plan.lanes
    total = lax.fori_loop(0, n_steps, add, jnp.zeros((rows, cols), jnp.int32))
    out_ref[:, :] = total.astype(out_ref.dtype)


def input_grad_kernel(*refs: Any, plan: Plan, carrier: Any) -> None:
    """``out[positions, C]`` of a block: codes of the gradient times signs of the weights."""
    *left, w_ref, out_ref = refs
    rows, cols = out_ref.shape
    shape = (rows, plan.lanes)
    p = iota(pl.program_id(0) * rows, (rows, 1), 0)

    def codes(step: jax.Array) -> jax.Array:
        if plan.laid_out:
            (codes_ref,) = left
            at = pl.multiple_of(step * plan.lanes, plan.lanes)
            return codes_ref[:, pl.ds(at, plan.lanes)].astype(jnp.int32)
        g_ref, lo_ref, scale_ref, sample_ref, seed_ref = left
        tap, o = divide(iota(step * plan.lanes, (1, plan.lanes), 1), plan.o)
        sample, place, valid = plan.output_source(_full(p, shape), _full(tap, shape))
        area = plan.output_size[0] * plan.output_size[1]
        row, o = sample_ref[sample] * area + place, _full(o, shape)
        code = codes_at(
            g_ref[row, o],
            lo_ref[sample],
            scale_ref[sample],
            (seed_ref[0], seed_ref[1]),
            row * plan.o + o,
            plan.bits,
        )
        return jnp.where(valid, code, 0)

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        at = pl.multiple_of((step >> 3) * plan.lanes, plan.lanes)
        signs = signs_at(w_ref[pl.ds(at, plan.lanes), :].astype(jnp.int32), step & 7)
        return total + exact_dot(codes(step), signs, carrier)

    n_steps = -(-plan.n_taps * plan.o // plan.lanes)
    out_ref[:, :] = lax.fori_loop(0, n_steps, add, jnp.zeros((rows, cols), jnp.int32))


def weight_grad_kernel(*refs: Any, plan: Plan, carrier: Any, n_steps: int) -> None:
    """``out[8, (tap, byte), O]`` of a block, summed over one part of the positions."""
    x_ref, *right, out_ref = refs
    rows, cols = out_ref.shape[2:]
    first = pl.program_id(2) * n_steps
    k = iota(pl.program_id(0) * rows, (rows, 1), 0)
    tap, byte = divide(k, plan.n_bytes)
    o = iota(pl.program_id(1) * cols, (1, cols), 1)
    area = plan.output_size[0] * plan.output_size[1]

    def codes(step: jax.Array) -> jax.Array:
        if plan.laid_out:
            (codes_ref,) = right
            at = pl.multiple_of(step * plan.lanes, plan.lanes)
            return codes_ref[pl.ds(at, plan.lanes), :].astype(jnp.int32)
        g_ref, lo_ref, scale_ref, sample_ref, channel_ref, seed_ref = right
        shape = (plan.lanes, cols)
        p = iota((first + step) * plan.lanes, (plan.lanes, 1), 0)
        valid = (p < plan.n * area) & (o < plan.o)
        sample, place = divide(jnp.where(p < plan.n * area, p, 0), area)
        kept = _full(jnp.where(o < plan.o, o, 0), shape)
        number = _full(sample_ref[sample], shape)  # -1 for a slot that is not used
        valid = valid & (number >= 0)
        row = jnp.where(valid, number * area + place, 0)
        channel = channel_ref[kept]
        # One row of the tables serves all samples unless weights are folded in.
        table = _full(sample if lo_ref.shape[0] > 1 else jnp.zeros_like(sample), shape)
        code = codes_at(
            g_ref[row, channel],
            lo_ref[table, kept],
            scale_ref[table, kept],
            (seed_ref[0], seed_ref[1]),
            row * g_ref.shape[1] + channel,
            plan.bits,
        )
        return jnp.where(valid, code, 0)

    def add(step: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        shape = (rows, plan.lanes)
        p = iota((first + step) * plan.lanes, (1, plan.lanes), 1)
        source, valid = plan.input_source(_full(p, shape), _full(tap, shape))
        at = pl.ds(pl.multiple_of(step * plan.lanes, plan.lanes), plan.lanes)
        x = x_ref[:, at] if plan.laid_out else x_ref[source, _full(byte, shape)]
        x, code = x.astype(jnp.int32), codes(step)
        return tuple(
            total + exact_dot(signs_at(x, bit, valid), code, carrier)
            for bit, total in enumerate(totals)
        )

    totals = lax.fori_loop(0, n_steps, add, (jnp.zeros((rows, cols), jnp.int32),) * 8)
    for bit, total in enumerate(totals):
        out_ref[0, bit, :, :] = total
