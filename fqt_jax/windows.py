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
