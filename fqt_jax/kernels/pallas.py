"""Pallas kernels for GPU (Triton) and TPU: packed bits in memory, matrix units for the products.

Signs stay packed in device memory and are unpacked tile by tile inside the kernel
(:mod:`fqt_jax.kernels.pallas_tiles`), to ``int8`` on a GPU and ``bfloat16`` on a TPU, and codes of
eight bits to ``bfloat16`` on both. Sums are ``int32``. On a GPU nothing is laid out beforehand: the
kernels gather what a window sees, and round the gradient as they read it. From version 0.11 on jax
warns there that Pallas' Triton backend is deprecated; it is part of every version of jax that this
package allows.

On a CPU the kernels run in Pallas' interpreter, which is for tests: only where the environment
variable ``FQT_JAX_PALLAS_INTERPRET`` is ``1``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from fqt_jax.binarize import PackedBits
from fqt_jax.kernels.contract import Pair, Rounding, Window, sum_dtype
from fqt_jax.kernels.dispatch import Implementation, Kernel
from fqt_jax.kernels.packed import channel_bytes, pack_bytes, spread, tap_columns
from fqt_jax.kernels.pallas_tiles import (
    Plan,
    forward_kernel,
    input_grad_kernel,
    weight_grad_kernel,
)
from fqt_jax.kernels.scaling import (
    code_grid,
    declines_input_grad,
    declines_weight_grad,
    gradient_codes,
    input_sign_sums,
    per_sample,
    scale_input_grad,
    scale_weight_grad,
    take,
    weight_sign_sums,
)
from fqt_jax.kernels.xla import IMPLEMENTATION as XLA

_INTERPRET = "FQT_JAX_PALLAS_INTERPRET"
_PROGRAMS = 512  # that many at least keep a GPU busy in the weight gradient
_SPLIT = 2048  # positions of one program of the weight gradient, at most on a TPU


def platforms() -> tuple[str, ...]:
    """Where the kernels run now."""
    return ("cuda", "rocm", "tpu", "cpu") if _interpreted() else ("cuda", "rocm", "tpu")


def _interpreted() -> bool:
    return os.environ.get(_INTERPRET) == "1"


def _plan(
    platform: str, window: Window, input_size: Pair, n: int, c: int, o: int, bits: int = 1
) -> Plan:
    laid_out = platform == "tpu"
    return Plan(window, input_size, n, c, o, bits, 128 if laid_out else 32, laid_out)


def _carrier(plan: Plan) -> Any:
    return jnp.bfloat16 if plan.laid_out or plan.bits == 8 else jnp.int8


def _tile(extent: int, plan: Plan, most: int) -> int:
    """A legal extent of a tile: whole lanes on a TPU, on a GPU the least power of two that fits."""
    if plan.laid_out:
        return 128
    return min(most, max(16, 1 << (extent - 1).bit_length()))


def _pad_to(a: jax.Array, *multiples: int) -> jax.Array:
    return jnp.pad(a, [(0, -n % m) for n, m in zip(a.shape, multiples, strict=True)])


def _whole(a: jax.Array) -> pl.BlockSpec:
    """The array as it is: a GPU's kernel gathers from it."""
    return pl.BlockSpec(a.shape, lambda *_: (0,) * a.ndim)


def _call(
    kernel: Callable[..., None],
    plan: Plan,
    grid: tuple[int, ...],
    operands: list[tuple[jax.Array, pl.BlockSpec]],
    out: tuple[tuple[int, ...], Any, pl.BlockSpec],
) -> jax.Array:
    shape, dtype, out_spec = out
    arrays = [array for array, _ in operands]

    return pl.pallas_call(
        functools.partial(kernel, plan=plan, carrier=_carrier(plan)),
        grid=grid,
        in_specs=[spec for _, spec in operands],
        out_specs=out_spec,
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        compiler_params=None if plan.laid_out else triton.CompilerParams(),
        interpret=_interpreted(),
    )(*arrays)


def forward(x: PackedBits, w: PackedBits, *, window: Window, platform: str) -> jax.Array:
    """See :func:`fqt_jax.kernels.forward`."""
    (h, width, c), (kh, kw, _, o) = x.shape, w.shape
    n = x.words.shape[0]
    plan = _plan(platform, window, (h, width), n, c, o)
    positions = n * plan.output_size[0] * plan.output_size[1]
    dtype = sum_dtype(kh * kw * c)
    if positions * c * o == 0:
        return jnp.zeros((n, *plan.output_size, o), dtype)
    rows, cols = _tile(positions, plan, 128), _tile(o, plan, 64)
    weights = _pad_to(pack_bytes(w.unpack(), axis=2).reshape(-1, o), plan.lanes, cols)
    signs = channel_bytes(x)
    if plan.laid_out:
        columns = jax.vmap(lambda a: tap_columns(a, window, plan.output_size))(signs)
        columns = _pad_to(columns.reshape(positions, -1), rows, plan.lanes)
        left = (columns, pl.BlockSpec((rows, columns.shape[1]), lambda i, j: (i, 0)))
    else:
        flat = signs.reshape(n * h * width, -1)
        left = (flat, _whole(flat))
    shape = (-(-positions // rows) * rows, weights.shape[1])
    z = _call(
        forward_kernel,
        plan,
        (shape[0] // rows, shape[1] // cols),
        [left, (weights, pl.BlockSpec((weights.shape[0], cols), lambda i, j: (0, j)))],
        (
            shape,
            jnp.int32 if plan.laid_out else dtype,
            pl.BlockSpec((rows, cols), lambda i, j: (i, j)),
        ),
    )
    return z[:positions, :o].reshape(n, *plan.output_size, o).astype(dtype)


def input_grad(
    g: jax.Array,
    w: PackedBits,
    rounding: Rounding,
    mask: PackedBits | None,
    *,
    window: Window,
    input_size: Pair,
    compact: bool,
    platform: str,
) -> jax.Array:
    """See :func:`fqt_jax.kernels.input_grad`."""
    _, _, c, o = w.shape
    n = rounding.lo.shape[0]
    plan = _plan(platform, window, input_size, n, c, o, rounding.bits)
    positions = n * input_size[0] * input_size[1]
    sign_sums = input_sign_sums(w, window, input_size)
    if positions * c * o == 0:
        sums = jnp.zeros((n, *input_size, c), jnp.int32)
        return scale_input_grad(sums, sign_sums, rounding, g.shape[0], mask, compact)
    rows, cols = _tile(positions, plan, 128), _tile(c, plan, 64)
    # Bit b of byte row (i, k) is the sign of row (8 i + b, k), with ``lanes`` rows k: the rows of
    # one product then share a bit.
    flipped = w.unpack()[::-1, ::-1].transpose(0, 1, 3, 2).reshape(-1, c)
    flipped = _pad_to(flipped, 8 * plan.lanes, cols).reshape(
        -1, 8, plan.lanes, -(-c // cols) * cols
    )
    weights = pack_bytes(flipped, axis=1).reshape(-1, flipped.shape[3])
    right = (weights, pl.BlockSpec((weights.shape[0], cols), lambda i, j: (0, j)))
    if plan.laid_out:
        codes = gradient_codes(g, rounding).astype(jnp.uint8)
        columns = jax.vmap(
            lambda a: tap_columns(spread(a, window, input_size), Window(window.size), input_size)
        )(codes)
        columns = _pad_to(columns.reshape(positions, -1), rows, plan.lanes)
        left = [(columns, pl.BlockSpec((rows, columns.shape[1]), lambda i, j: (i, 0)))]
    else:
        lo, scale = (a.reshape(-1) for a in code_grid(rounding))
        kept = (
            jnp.arange(n, dtype=jnp.int32) if rounding.samples is None else rounding.samples.indices
        )
        operands = [g.reshape(-1, o), lo, scale, kept, rounding.seed]
        left = [(a, _whole(a)) for a in operands]
    shape = (-(-positions // rows) * rows, weights.shape[1])
    sums = _call(
        input_grad_kernel,
        plan,
        (shape[0] // rows, shape[1] // cols),
        [*left, right],
        (shape, jnp.int32, pl.BlockSpec((rows, cols), lambda i, j: (i, j))),
    )
    sums = sums[:positions, :c].reshape(n, *input_size, c)
    return scale_input_grad(sums, sign_sums, rounding, g.shape[0], mask, compact)


def weight_grad(
    g: jax.Array, x: PackedBits, rounding: Rounding, *, window: Window, platform: str
) -> jax.Array:
    """See :func:`fqt_jax.kernels.weight_grad`."""
    (h, width, c), (kh, kw) = x.shape, window.size
    samples, channels = rounding.samples, rounding.channels
    kept = take(x, samples)
    n, o = kept.words.shape[0], rounding.lo.shape[0]
    plan = _plan(platform, window, (h, width), n, c, o, rounding.bits)
    positions = n * plan.output_size[0] * plan.output_size[1]
    sign_sums = weight_sign_sums(kept, samples, window)
    if positions * c * o == 0:
        return scale_weight_grad(
            jnp.zeros((kh, kw, c, o), jnp.int32), sign_sums, rounding, g.shape[3]
        )
    n_rows = plan.n_taps * plan.n_bytes
    rows, cols = _tile(n_rows, plan, 16), _tile(o, plan, 64)
    grid_rows, grid_cols = -(-n_rows // rows), -(-o // cols)
    if plan.laid_out:
        n_splits = -(-positions // _SPLIT)
    else:
        n_splits = max(1, min(_PROGRAMS // (grid_rows * grid_cols), positions // plan.lanes // 4))
    n_steps = -(-positions // (n_splits * plan.lanes))
    part = n_steps * plan.lanes
    signs = channel_bytes(kept)
    if plan.laid_out:
        columns = jax.vmap(lambda a: tap_columns(a, window, plan.output_size))(signs)
        columns = _pad_to(columns.reshape(positions, -1).T, rows, n_splits * part)
        codes = gradient_codes(g, rounding)
        if samples is not None:
            codes = jnp.where(per_sample(samples.weights) == 0, jnp.zeros_like(codes), codes)
        codes = _pad_to(codes.astype(jnp.uint8).reshape(positions, o), n_splits * part, cols)
        operands = [
            (columns, pl.BlockSpec((rows, part), lambda i, j, s: (i, s))),
            (codes, pl.BlockSpec((part, cols), lambda i, j, s: (s, j))),
        ]
    else:
        lo, scale = (a.reshape(-1, o) for a in code_grid(rounding))
        numbers = jnp.arange(n, dtype=jnp.int32)
        if samples is not None:
            numbers = jnp.where(samples.weights == 0, jnp.int32(-1), samples.indices)
        which = jnp.arange(o, dtype=jnp.int32) if channels is None else channels.indices
        flat = signs.reshape(n * h * width, -1)
        arrays = [flat, g.reshape(-1, g.shape[3]), lo, scale, numbers, which, rounding.seed]
        operands = [(a, _whole(a)) for a in arrays]
    shape = (n_splits, 8, grid_rows * rows, grid_cols * cols)
    sums = _call(
        functools.partial(weight_grad_kernel, n_steps=n_steps),
        plan,
        (grid_rows, grid_cols, n_splits),
        operands,
        (shape, jnp.int32, pl.BlockSpec((1, 8, rows, cols), lambda i, j, s: (s, 0, i, j))),
    )
    total = jnp.sum(sums, axis=0)[:, :n_rows, :o].reshape(8, kh, kw, plan.n_bytes, o)
    total = total.transpose(1, 2, 3, 0, 4).reshape(kh, kw, plan.n_bytes * 8, o)[:, :, :c]
    return scale_weight_grad(total, sign_sums, rounding, g.shape[3])


IMPLEMENTATION = Implementation(
    "pallas",
    {
        **XLA.kernels,
        "forward": Kernel(forward),
        "input_grad": Kernel(input_grad, declines_input_grad),
        "weight_grad": Kernel(weight_grad, declines_weight_grad),
    },
    platforms,
)
