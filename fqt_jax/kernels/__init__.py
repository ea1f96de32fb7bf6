"""Integer products of binary operands: one contract, several implementations.

Three products make a quantized layer. With ``x`` and ``w`` signs and ``Q(g)`` the quantized
gradient of the output (:class:`~fqt_jax.kernels.contract.Rounding`):

============== ============================== ==============================
``forward``    ``z = x * w``                  ``int16`` or ``int32``, exact
``input_grad`` ``dx = Q(g) *^T w``            ``float32[N, H, W, C]``
``weight_grad`` ``dw = x * Q(g)``             ``float32[kh, kw, C, O]``
============== ============================== ==============================

A dense layer is a convolution of one position with a 1x1 window. Each implementation is a module
with these three functions and ``unavailable()``; it raises
:class:`~fqt_jax.kernels.contract.UnsupportedError` for a case it does not serve. With
``implementation=None`` the first that serves the case runs; a name given explicitly fails loudly.
All implementations agree exactly on codes and integer sums, and to a few ulp on float results.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

from fqt_jax.binarize import PackedBits
from fqt_jax.kernels import native, packed, pallas, xla
from fqt_jax.kernels.contract import (
    Pair,
    Rounding,
    UnsupportedError,
    Window,
    check_forward,
    check_gradient,
    check_rounding,
)

_IMPLEMENTATIONS: dict[str, ModuleType] = {  # by preference
    "native": native,
    "xla": xla,
    "pallas": pallas,  # after xla until it was measured against it on a GPU
    "packed": packed,
}


def implementations() -> dict[str, str]:
    """The implementations by name, each with ``"available"`` or the reason why it is not.

    Example:
      >>> import fqt_jax
      >>> fqt_jax.implementations()["xla"]
      'available'
    """
    return {name: module.unavailable() or "available" for name, module in _IMPLEMENTATIONS.items()}


def check_implementation(name: str | None) -> None:
    """Raises ``ValueError`` for an unknown implementation, or one that is not available here."""
    native.check_environment()
    if name is None:
        return
    known = implementations()
    if name not in known:
        raise ValueError(f"unknown implementation {name!r}; known: {', '.join(known)}.")
    if known[name] != "available":
        raise ValueError(f"implementation {name!r} is not available: {known[name]}.")


def _dispatch(product: str, name: str | None, call: Callable[[Any], jax.Array]) -> jax.Array:
    check_implementation(name)
    declined = []
    for candidate, module in _IMPLEMENTATIONS.items():
        if name not in (None, candidate) or module.unavailable():
            continue
        try:
            return call(getattr(module, product))
        except UnsupportedError as error:
            declined.append(f"{candidate}: {error}")
    raise UnsupportedError(f"no implementation serves this {product}; " + "; ".join(declined))


def forward(
    x: PackedBits, w: PackedBits, window: Window, *, implementation: str | None = None
) -> jax.Array:
    """Exact convolution of signs; padding contributes zero.

    Args:
      x: signs of the input, batch ``[N]``, shape ``(H, W, C)``.
      w: signs of the weights, no batch, shape ``(kh, kw, C, O)``.
      window: size, strides and padding.
      implementation: name of the implementation; ``None`` picks one.

    Returns:
      ``[N, H', W', O]``: ``int16`` where ``kh * kw * C`` fits, else ``int32``.

    Raises:
      ValueError: the operands do not fit together, or no implementation serves the case.
    """
    check_forward(x, w, window)
    return _dispatch("forward", implementation, lambda run: run(x, w, window))


def input_grad(
    g: jax.Array,
    w: PackedBits,
    rounding: Rounding | None,
    window: Window,
    input_size: Pair,
    *,
    mask: PackedBits | None = None,
    compact: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Gradient with respect to the signs of the input.

    Args:
      g: gradient of the product's output, ``float32[N, H', W', O]``.
      w: signs of the weights, shape ``(kh, kw, C, O)``.
      rounding: codes over groups of samples; ``None`` uses ``g`` as it is.
      window: size, strides and padding of the forward convolution.
      input_size: ``(H, W)`` of its input.
      mask: of the shape of the input; entries whose bit is clear get zero.
      compact: leave out the samples that were not kept.
      implementation: name of the implementation; ``None`` picks one.

    Returns:
      ``float32[N, H, W, C]``, zero for samples that were not kept; with ``compact``, one row for
      each kept sample, in the order of the selection.

    Raises:
      ValueError: the operands do not fit together, or no implementation serves the case.
    """
    check_gradient(g, g.shape[0], input_size, w.shape[3], window)
    check_rounding(rounding, g, ("samples",))
    if rounding is not None and rounding.channels is not None:
        raise ValueError("the input gradient contracts over output channels: keep all of them.")
    return _dispatch(
        "input_grad",
        implementation,
        lambda run: run(g, w, rounding, window, input_size, mask, compact),
    )


def weight_grad(
    g: jax.Array,
    x: PackedBits,
    rounding: Rounding | None,
    window: Window,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Gradient with respect to the signs of the weights.

    Args:
      g: gradient of the product's output, ``float32[N, H', W', O]``.
      x: signs of the input, batch ``[N]``, shape ``(H, W, C)``.
      rounding: codes over groups of channels (integer product) or of samples (the scale is
        inside the sum, so the product is emulated in float); ``None`` uses ``g`` as it is.
      window: size, strides and padding of the forward convolution.
      implementation: name of the implementation; ``None`` picks one.

    Returns:
      ``float32[kh, kw, C, O]``, zero for channels that were not kept.

    Raises:
      ValueError: the operands do not fit together, or no implementation serves the case.
    """
    check_gradient(g, x.words.shape[0], (x.shape[0], x.shape[1]), g.shape[3], window)
    check_rounding(rounding, g, ("channels", "samples"))
    return _dispatch("weight_grad", implementation, lambda run: run(g, x, rounding, window))


__all__ = [
    "Rounding",
    "UnsupportedError",
    "Window",
    "check_implementation",
    "forward",
    "implementations",
    "input_grad",
    "weight_grad",
]
