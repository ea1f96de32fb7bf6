"""C++ kernels for the CPU, called through XLA's foreign function interface.

Products by table look-up: one byte shuffle looks up the sum of four products in as many channels
as a vector has bytes (``csrc/tile.inc``); by counting bits (``csrc/popcount_forward.inc``) or on
matrix tiles (``csrc/amx.inc``), where a processor can. Codes are rounded inside the kernel, block
by block, and the samples and channels that were not kept are never read. The instruction set is
chosen at import; the environment variable ``FQT_JAX_ISA`` (``portable``, ``avx2``, ``avx512``,
``vpopcnt``, ``amx``, ``neon``) forces one.
How a call comes to its loop is in ``csrc/README.md``.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
from typing import Any

import jax

_SOURCES = pathlib.Path(__file__).parents[1] / "csrc"


def _load() -> str | None:
    """Registers the kernels; returns why they cannot be used, or ``None``."""
    try:
        import fqt_jax.kernels._native as _native
    except ModuleNotFoundError:
        return "the extension was not built (no C++ compiler when fqt_jax was installed?)"
    except ImportError as error:
        return f"the extension does not load: {error}"
    # An installed package has no sources beside it.
    if _SOURCES.exists() and getattr(_native, "sources_digest", str)() != _sources_digest():
        return "the extension was built from other sources than those here: install fqt_jax again"
    built, here = _native.ffi_version(), _installed_ffi_version()
    if built[0] != here[0] or built > here:
        # Registered all the same, such kernels would keep JAX's CPU backend from starting.
        return (
            "the extension was built for version {}.{} of XLA's foreign function interface, and "
            "the installed jaxlib has {}.{}: install fqt_jax again".format(*built, *here)
        )
    for name, capsule in _native.registrations().items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    return None


def _sources_digest() -> str:
    """Digest of the C++ sources, as ``csrc/CMakeLists.txt`` has it."""
    parts = sorted(
        path
        for path in _SOURCES.iterdir()
        if path.suffix in (".cc", ".h", ".inc") or path.name == "CMakeLists.txt"
    )
    lines = (f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in parts)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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


def unavailable() -> str | None:
    """Why the kernels cannot be used; ``None`` when they can.

    Raises:
      ValueError: ``FQT_JAX_ISA`` asks for what cannot be. Not at import: an entry point could not
        show the error as one line.
    """
    if _ISA_ERROR is not None:
        raise ValueError(_ISA_ERROR)
    return _LOAD_ERROR


def instruction_set() -> str | None:
    """The instruction set in use; ``None`` where the kernels cannot be used."""
    if unavailable() is not None:
        return None
    from fqt_jax.kernels import _native

    name: str = _native.current_isa()
    return name


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
    return kernel(*operands, **attributes)
