"""The operands of the integer products, and the checks that every implementation can rely on."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from fqt_jax.binarize import PackedBits
from fqt_jax.selection import GroupAxis, Selection

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Window:
    """The window of a convolution: its size, strides and explicit padding. Static.

    Attributes:
      size: ``(height, width)``.
      strides: ``(down, across)``.
      padding: ``((top, bottom), (left, right))``; padded entries count as zero, not as a sign.

    Example:
      >>> Window((3, 3), (2, 2), ((1, 1), (1, 1))).output_size((32, 32))
      (16, 16)
    """

    size: Pair = (1, 1)
    strides: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"window sizes must be at least 1; got {self.size}.")
        if min(self.strides) < 1:
            raise ValueError(f"strides must be at least 1; got {self.strides}.")
        if min(min(pair) for pair in self.padding) < 0:
            raise ValueError(f"padding must not be negative; got {self.padding}.")

    @property
    def is_dense(self) -> bool:
        """Whether the convolution is a plain matrix product at each position."""
        return (self.size, self.strides, self.padding) == ((1, 1), (1, 1), ((0, 0), (0, 0)))

    def output_size(self, size: Pair) -> Pair:
        """Spatial size of the output for an input of spatial ``size``.

        Raises:
          ValueError: the padded input is smaller than the window.
        """
        out = []
        for n, k, s, (before, after) in zip(
            size, self.size, self.strides, self.padding, strict=True
        ):
            padded = n + before + after
            if padded < k:
                raise ValueError(
                    f"the window {self.size} is larger than the padded input "
                    f"(size {size}, padding {self.padding})."
                )
            out.append((padded - k) // s + 1)
        return out[0], out[1]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lo", "value_range", "seed", "samples", "channels"],
    meta_fields=["bits", "groups"],
)
@dataclasses.dataclass(frozen=True)
class Rounding:
    """How a kernel turns the gradient ``g`` of the product's output into codes.

    ``g`` has the shape ``[N, H', W', O]``. Only the kept samples and channels are read. The groups
    that share a scale are ``groups``; the weights of the *other* axis are folded into ``g`` before
    rounding, the weights of the groups' own axis multiply the result. With ``q`` the codes
    (:mod:`fqt_jax.rounding`; the counter of an entry is its flat index in the whole of ``g``), the
    quantized gradient of a kept entry in group ``i`` is ::

        weight_i * (lo_i + q * value_range_i / (2^bits - 1))

    Folding multiplies no entry by a weight: with ``v`` the other axis's weight, an entry is rounded
    as ``int32((g - lo_i * (1 / v)) * (s_i * v))``, a subtraction before a product as everywhere.

    Attributes:
      lo: ``float32[kept groups]``, minimum of each kept group after folding.
      value_range: ``float32[kept groups]``, its range, at least ``rounding.MIN_RANGE``.
      seed: ``uint32[2]``.
      samples: the samples kept; ``None`` for all, with weight one.
      channels: the output channels kept; ``None`` for all, with weight one.
      bits: width of a code, 1 to 8; static.
      groups: ``"samples"`` or ``"channels"``; static.
    """

    lo: jax.Array
    value_range: jax.Array
    seed: jax.Array
    samples: Selection | None
    channels: Selection | None
    bits: int
    groups: GroupAxis


class UnsupportedError(ValueError):
    """No implementation serves a case. The message says why."""


def sum_dtype(n_terms: int) -> jnp.dtype:
    """The integer type of a sum of ``n_terms`` signs: ``int16`` where it fits, else ``int32``."""
    return jnp.dtype(jnp.int16 if n_terms <= 2**15 - 1 else jnp.int32)


def exceeds_int32(terms: int, bits: int) -> str | None:
    """Says so where a sum of codes may not fit ``int32``."""
    if terms * ((1 << bits) - 1) < 2**31:
        return None
    return f"sums over {terms} codes of {bits} bits exceed int32"


def check_forward(x: PackedBits, w: PackedBits, window: Window) -> None:
    """Raises ``ValueError`` unless ``x`` and ``w`` are the operands of a convolution."""
    if len(x.shape) != 3 or len(w.shape) != 4:
        raise ValueError(
            "x must hold samples of shape (H, W, C) and w be of shape (kh, kw, C, O); "
            f"got {x.shape} and {w.shape}."
        )
    if w.shape[:2] != window.size:
        raise ValueError(f"w of shape {w.shape} does not have the window size {window.size}.")
    if x.shape[2] != w.shape[2]:
        raise ValueError(f"x has {x.shape[2]} channels, but w takes {w.shape[2]}.")
    if math.prod(w.shape[:3]) >= 2**24:
        raise ValueError(f"sums of {math.prod(w.shape[:3])} products exceed 2^24.")
    window.output_size((x.shape[0], x.shape[1]))


def check_gradient(
    g: jax.Array, n_samples: int, input_size: Pair, n_out: int, window: Window
) -> None:
    """Raises unless ``g`` is ``float32`` of the shape of the product's output."""
    expected = (n_samples, *window.output_size(input_size), n_out)
    if g.shape != expected:
        raise ValueError(f"g must have the shape {expected} of the output; got {g.shape}.")
    if g.dtype != jnp.float32:
        raise TypeError(f"g must be float32; got {g.dtype}.")


def check_rounding(rounding: Rounding | None, g: jax.Array, groups: tuple[GroupAxis, ...]) -> None:
    """Raises ``ValueError`` unless ``rounding`` fits the gradient ``g``."""
    if rounding is None:
        return
    if not 1 <= rounding.bits <= 8:
        raise ValueError(f"bits must be from 1 to 8; got {rounding.bits}.")
    if rounding.groups not in groups:
        raise ValueError(f"groups must be one of {groups}; got {rounding.groups!r}.")
    sizes = {"samples": g.shape[0], "channels": g.shape[3]}
    for axis, size in sizes.items():
        selection: Selection | None = getattr(rounding, axis)
        if selection is None:
            continue
        if selection.size != size or selection.indices.shape[0] > size:
            raise ValueError(
                f"the selection of {axis} keeps {selection.indices.shape[0]} of {selection.size}, "
                f"but g has {size}."
            )
        sizes[axis] = selection.indices.shape[0]
    expected = (sizes[rounding.groups],)
    if rounding.lo.shape != expected or rounding.value_range.shape != expected:
        raise ValueError(
            f"lo and value_range must have one entry for each kept group, {expected}; got "
            f"{rounding.lo.shape} and {rounding.value_range.shape}."
        )
    if rounding.seed.shape != (2,) or rounding.seed.dtype != jnp.uint32:
        raise ValueError(
            f"seed must be uint32[2]; got {rounding.seed.dtype}{list(rounding.seed.shape)}."
        )


def check_source(source: jax.Array, pool: int = 1) -> None:
    """Raises unless ``source`` is one of a transform, and windows of ``pool`` fit into it."""
    if source.ndim != 4:
        raise ValueError(f"the source must be [N, H, W, C]; got the shape {source.shape}.")
    if source.dtype.name not in ("int16", "int32", "float32"):
        raise TypeError(f"the source must be int16, int32 or float32; got {source.dtype}.")
    if not 1 <= pool <= min(source.shape[1:3]):
        size = source.shape[1:3]
        raise ValueError(f"pool must be from 1 to the size of the image, {size}; got {pool}.")


def check_floats(shape: tuple[int, ...], **arrays: jax.Array | None) -> None:
    """Raises unless each array, by its name, is ``float32`` of ``shape`` or ``None``."""
    for name, array in arrays.items():
        if array is not None and (array.shape != shape or array.dtype != jnp.float32):
            raise ValueError(
                f"{name} must be float32{list(shape)}; got {array.dtype}{list(array.shape)}."
            )


def check_kept(samples: jax.Array | None, n: int) -> int:
    """How many of ``n`` samples these indices keep, all for ``None``; raises for others."""
    if samples is None:
        return n
    if samples.ndim != 1 or samples.dtype != jnp.int32 or samples.shape[0] > n:
        raise ValueError(
            f"samples must be at most {n} indices, int32; got {samples.dtype}{list(samples.shape)}."
        )
    return samples.shape[0]


def convolved_shape(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], window: Window
) -> tuple[int, ...]:
    """Shape of a float convolution; raises ``ValueError`` unless the operands fit together."""
    if len(x_shape) != 4 or len(w_shape) != 4:
        raise ValueError(f"x must be [N, H, W, C] and w [kh, kw, C, O]; got {x_shape}, {w_shape}.")
    expected = (*window.size, x_shape[3])
    if w_shape[:3] != expected:
        raise ValueError(f"w must have the shape {(*expected, w_shape[3])}; got {w_shape}.")
    return (x_shape[0], *window.output_size((x_shape[1], x_shape[2])), w_shape[3])
