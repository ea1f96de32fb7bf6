"""Windows of convolutions, from strides and padding as users write them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from jax import lax

from fqt_jax.kernels.contract import Window

Padding = str | int | Sequence[int | tuple[int, int]]


def resolve_window(
    size: Sequence[int], input_size: Sequence[int], strides: Any, padding: Padding
) -> Window:
    """The :class:`Window` of a convolution, with padding made explicit.

    Raises:
      ValueError: strides or padding are not of a known form.
    """
    try:
        each = (strides, strides) if isinstance(strides, int) else strides
        pair = tuple(operator.index(s) for s in each)
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"strides must be one or two positive integers; got {strides!r}."
        ) from None
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise ValueError(
                f"padding must be 'SAME', 'VALID' or explicit numbers; got {padding!r}."
            )
        pads = lax.padtype_to_pads(input_size, size, pair, padding.upper())
    else:
        try:
            each = [padding, padding] if isinstance(padding, int) else list(padding)
            both = [(p, p) if isinstance(p, int) else p for p in each]
            pads = [(operator.index(before), operator.index(after)) for before, after in both]
            if len(pads) != 2:
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(
                f"padding must be a string, a number or two (before, after); got {padding!r}."
            ) from None
    (top, bottom), (left, right) = pads
    return Window((size[0], size[1]), pair, ((top, bottom), (left, right)))


def per_axis(name: str, value: int | Sequence[int] | None, axes: int) -> tuple[int, ...]:
    """One positive number for each axis; ``None`` stands for one.

    Raises:
      ValueError: the value is something else.
    """
    value = 1 if value is None else value
    each = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(each) != axes or not all(isinstance(n, int) and n > 0 for n in each):
        raise ValueError(f"{name} must be a positive number, or {axes} of them; got {value!r}.")
    return each


def explicit_padding(
    padding: Padding, size: tuple[int, ...], dilation: tuple[int, ...]
) -> str | tuple[tuple[int, int], ...]:
    """Padding by one of four names, or as ``(before, after)`` for each axis.

    Raises:
      ValueError: it is of no known form.
    """
    if isinstance(padding, str):
        name = padding.upper()
        if name == "CAUSAL" and len(size) == 1:
            return (((size[0] - 1) * dilation[0], 0),)
        if name not in ("SAME", "VALID", "CIRCULAR", "REFLECT"):
            raise ValueError(
                "padding must be 'SAME', 'VALID', 'CIRCULAR', 'REFLECT', explicit numbers, or "
                f"along one axis 'CAUSAL'; got {padding!r}."
            )
        return name
    try:
        each = [padding] * len(size) if isinstance(padding, int) else list(padding)
        both = [(p, p) if isinstance(p, int) else tuple(p) for p in each]
        pads = tuple((before, after) for before, after in both)
        if len(pads) != len(size) or not all(isinstance(n, int) for pad in pads for n in pad):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"padding must be a string, a number, or (before, after) for each of {len(size)} axes; "
            f"got {padding!r}."
        ) from None
    return pads
