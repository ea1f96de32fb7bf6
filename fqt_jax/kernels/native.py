"""C++ kernels for the CPU, called through XLA's foreign function interface.

Products by table look-up: one byte shuffle looks up the sum of four products in as many channels
as a vector has bytes (``csrc/tile.h``). Codes are rounded inside the kernel, tile by tile, and the
samples and channels that were not kept are never read. The instruction set is chosen at import;
the environment variable ``FQT_JAX_ISA`` (``portable``, ``avx2``, ``avx512``, ``neon``) forces one.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fqt_jax.binarize import PackedBits
from fqt_jax.kernels.contract import (
    Pair,
    Rounding,
    UnsupportedError,
    Window,
    check_int32_sums,
    sum_dtype,
)
from fqt_jax.pruning import Selection
from fqt_jax.sharding import vary, varying_axes

_KERNELS = {
    "fqt_jax_forward",
    "fqt_jax_input_grad",
    "fqt_jax_weight_grad",
    "fqt_jax_moments",
    "fqt_jax_encode",
    "fqt_jax_encode_weights",
    "fqt_jax_activate",
    "fqt_jax_gradient_sums",
    "fqt_jax_gradient",
    "fqt_jax_finish_weight_grad",
    "fqt_jax_float_conv",
    "fqt_jax_float_conv_weight_grad",
    "fqt_jax_adam",
}


def _load() -> str | None:
    """Registers the kernels; returns why they cannot be used, or ``None``."""
    try:
        import fqt_jax.kernels._native as _native
    except ModuleNotFoundError:
        return "the extension was not built (no C++ compiler when fqt_jax was installed?)"
    except ImportError as error:
        return f"the extension does not load: {error}"
    registrations = _native.registrations()
    if not hasattr(_native, "ffi_version") or not registrations.keys() >= _KERNELS:
        return "the extension was built from older sources: install fqt_jax again"
    built, here = _native.ffi_version(), _installed_ffi_version()
    if built[0] != here[0] or built > here:
        # Registered all the same, such kernels would keep JAX's CPU backend from starting.
        return (
            "the extension was built for version {}.{} of XLA's foreign function interface, and "
            "the installed jaxlib has {}.{}: install fqt_jax again".format(*built, *here)
        )
    for name, capsule in registrations.items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    return None


def _installed_ffi_version() -> tuple[int, int]:
    """Version of the foreign function interface that the installed jaxlib speaks."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    return int(found["MAJOR"]), int(found["MINOR"])


def _select_isa(load_error: str | None) -> str | None:
    """Chooses the instruction set that ``FQT_JAX_ISA`` names; returns why that cannot be."""
    isa = os.environ.get("FQT_JAX_ISA")
    if not isa:
        return None
    if load_error is not None:
        return f"FQT_JAX_ISA={isa!r} is for the native kernels, which cannot be used: {load_error}."
    from fqt_jax.kernels import _native

    supported = _native.supported_isas()
    if isa not in supported:
        return (
            f"FQT_JAX_ISA={isa!r} names no instruction set that runs here; allowed are "
            f"{', '.join(supported)}."
        )
    _native.select_isa(isa)
    return None


_LOAD_ERROR = _load()
_ISA_ERROR = _select_isa(_LOAD_ERROR)


def check_environment() -> None:
    """Raises ``ValueError`` where ``FQT_JAX_ISA`` asks for what cannot be.

    Not at import: an entry point could not show the error as one line.
    """
    if _ISA_ERROR is not None:
        raise ValueError(_ISA_ERROR)


def unavailable() -> str | None:
    """Why this implementation cannot run here; ``None`` when it can.

    Raises:
      ValueError: see :func:`check_environment`.
    """
    check_environment()
    if _LOAD_ERROR is not None:
        return _LOAD_ERROR
    if jax.default_backend() != "cpu":
        return f"the kernels run on the CPU, and the backend is {jax.default_backend()}"
    return None


def forward(x: PackedBits, w: PackedBits, window: Window) -> jax.Array:
    """See :func:`fqt_jax.kernels.forward`."""
    n, (h, width, c), o = x.words.shape[0], x.shape, w.shape[3]
    shape = (n, *window.output_size((h, width)), o)
    out = jax.ShapeDtypeStruct(shape, sum_dtype(math.prod(window.size) * c))
    return call("forward", out, x.words, w.words, sizes=_sizes((h, width), c, o, window))


def input_grad(
    g: jax.Array,
    w: PackedBits,
    rounding: Rounding | None,
    window: Window,
    input_size: Pair,
    mask: PackedBits | None = None,
    compact: bool = False,
) -> jax.Array:
    """See :func:`fqt_jax.kernels.input_grad`."""
    rounding = _rounding(rounding)
    _, _, c, o = w.shape
    check_int32_sums(math.prod(window.size) * o, rounding.bits)
    n = rounding.lo.shape[0] if compact else g.shape[0]
    return call(
        "input_grad",
        jax.ShapeDtypeStruct((n, *input_size, c), jnp.float32),
        g,
        w.words,
        rounding.lo,
        rounding.value_range,
        rounding.seed,
        *_selection(rounding.samples),
        jnp.zeros((0, 0), jnp.uint32) if mask is None else mask.words,
        sizes=_sizes(input_size, c, o, window),
        bits=np.int64(rounding.bits),
        selects_samples=rounding.samples is not None,
        has_mask=mask is not None,
        scatters=not compact,
    )


def weight_grad(
    g: jax.Array, x: PackedBits, rounding: Rounding | None, window: Window
) -> jax.Array:
    """See :func:`fqt_jax.kernels.weight_grad`."""
    rounding = _rounding(rounding)
    if rounding.groups == "samples":
        raise UnsupportedError("scales of samples lie inside the sum over samples")
    h, width, c = x.shape
    n, out_h, out_w, o = g.shape
    samples = n if rounding.samples is None else rounding.samples.indices.shape[0]
    check_int32_sums(samples * out_h * out_w, rounding.bits)
    return call(
        "weight_grad",
        jax.ShapeDtypeStruct((*window.size, c, o), jnp.float32),
        g,
        x.words,
        rounding.lo,
        rounding.value_range,
        rounding.seed,
        *_selection(rounding.samples),
        *_selection(rounding.channels),
        sizes=_sizes((h, width), c, o, window),
        bits=np.int64(rounding.bits),
        selects_samples=rounding.samples is not None,
        selects_channels=rounding.channels is not None,
    )


def float_conv(x: jax.Array, w: jax.Array, window: Window) -> jax.Array:
    """Convolution of floats, ``x[N, H, W, C]`` with ``w[kh, kw, C, O]``; none may be empty."""
    n, h, width, c = x.shape
    o = w.shape[3]
    out = jax.ShapeDtypeStruct((n, *window.output_size((h, width)), o), jnp.float32)
    return call("float_conv", out, x, w, sizes=_sizes((h, width), c, o, window))


def float_conv_weight_grad(x: jax.Array, g: jax.Array, window: Window) -> jax.Array:
    """Gradient of :func:`float_conv` with respect to ``w``, from ``g[N, H', W', O]``."""
    _, h, width, c = x.shape
    o = g.shape[3]
    out = jax.ShapeDtypeStruct((*window.size, c, o), jnp.float32)
    return call("float_conv_weight_grad", out, x, g, sizes=_sizes((h, width), c, o, window))


def adam(
    g: jax.Array, m: jax.Array, v: jax.Array, factors: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of Adam's moments; see :func:`fqt_jax.optimizers.scale_by_adam`.

    Args:
      g: gradient, ``float32`` of any shape, not empty.
      m, v: moments, of its shape.
      factors: ``float32[7]``: ``1 - b1``, ``b1``, ``1 - b2``, ``b2``, the inverse corrections
        ``1 / (1 - b1^t)`` and ``1 / (1 - b2^t)``, and epsilon.

    Returns:
      The direction and the new moments, in the memory of ``g``, ``m`` and ``v``.
    """
    like = jax.ShapeDtypeStruct(g.shape, jnp.float32)
    direction, m, v = call(
        "adam", (like, like, like), g, m, v, factors, in_place={0: 0, 1: 1, 2: 2}
    )
    return direction, m, v


def call(
    name: str,
    results: Any,
    *operands: jax.Array,
    in_place: dict[int, int] | None = None,
    **attributes: Any,
) -> Any:
    """The one place that calls a kernel, by its name and the shapes and types of its results.

    Args:
      name: of the kernel.
      results: shapes and types of the results.
      *operands: of the kernel.
      in_place: numbers of operands, each with that of the result that takes its place in memory.
      **attributes: of the kernel.
    """
    kernel = jax.ffi.ffi_call(
        f"fqt_jax_{name}", results, vmap_method="sequential", input_output_aliases=in_place
    )
    # XLA's types say nothing of axes of a shard_map: what comes from shards varies like them.
    return vary(kernel(*operands, **attributes), varying_axes(operands))


def _rounding(rounding: Rounding | None) -> Rounding:
    if rounding is None:
        raise UnsupportedError("float gradients are left to XLA")
    return rounding


def _sizes(input_size: Pair, c: int, o: int, window: Window) -> np.ndarray:
    (top, bottom), (left, right) = window.padding
    sizes = (*input_size, c, o, *window.size, *window.strides, top, bottom, left, right)
    return np.array(sizes, np.int64)


def _selection(selection: Selection | None) -> tuple[jax.Array, jax.Array]:
    if selection is None:
        return jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.float32)
    return selection.indices, selection.weights
