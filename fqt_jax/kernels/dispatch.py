"""One dispatcher for every operation that has a fast form.

An operation is one JAX primitive with parameters: it is traced by the shapes of its results alone,
and the implementation that runs is looked up when it is *lowered*, for the platform that it is
lowered for. So a program written on one machine compiles for another, and what is not used is
never traced. Under ``vmap`` the implementation itself is mapped. Results are whole on each device
of a mesh of explicit axes: for data parallelism wrap the step in :func:`jax.shard_map`.

An implementation is a table of functions by the operation's name (:class:`Kernel`). Each may
decline a case, with a reason. With ``implementation=None`` the first that serves a case on a
platform runs; a name given explicitly fails loudly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.extend.core
from jax.interpreters import ad, batching, mlir, xla

from fqt_jax.kernels.contract import UnsupportedError
from fqt_jax.sharding import vary, varying_axes

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Kernel(NamedTuple):
    """How one implementation does one operation.

    Attributes:
      run: ``(*operands, platform=..., **static) -> results``. ``platform`` is what the computation
        is lowered for.
      declines: ``(*operands, **static)`` -> why it does not serve the case, or ``None``. It sees
        shapes and types only.
    """

    run: Callable[..., Any]
    declines: Callable[..., str | None] = lambda *_, **__: None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A set of kernels.

    Attributes:
      name: what ``implementation=`` calls it.
      kernels: by the name of the operation.
      platforms: names of those it runs on, now.
      unavailable: why it cannot run in this installation, or ``None``.
    """

    name: str
    kernels: Mapping[str, Kernel]
    platforms: Callable[[], tuple[str, ...]] = lambda: PLATFORMS
    unavailable: Callable[[], str | None] = lambda: None


_IMPLEMENTATIONS: dict[str, Implementation] = {}  # by preference


def register(*implementations: Implementation) -> None:
    """Adds implementations, the preferred ones first."""
    _IMPLEMENTATIONS.update((each.name, each) for each in implementations)


def implementations() -> dict[str, str]:
    """The implementations by name, each with ``"available"`` or the reason why it is not.

    Example:
      >>> import fqt_jax
      >>> fqt_jax.implementations()["xla"]
      'available'
    """
    return {name: _why_not_here(each) or "available" for name, each in _IMPLEMENTATIONS.items()}


def _why_not_here(implementation: Implementation) -> str | None:
    reason = implementation.unavailable()
    here = _platform(jax.default_backend())
    if reason is None and here not in implementation.platforms():
        return f"it runs on {', '.join(implementation.platforms())}, and the backend is {here}"
    return reason


def _platform(backend: str) -> str:
    if backend != "gpu":
        return backend
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version else "cuda"


def check_implementation(name: str | None) -> None:
    """Raises ``ValueError`` for an unknown implementation, or one that is not available here.

    Without a name it raises where the environment asks one of them for what cannot be.
    """
    if name is None:
        for each in _IMPLEMENTATIONS.values():
            each.unavailable()
        return
    reason = _why_not_here(_implementation(name))
    if reason is not None:
        raise ValueError(f"implementation {name!r} is not available: {reason}.")


def _implementation(name: str) -> Implementation:
    if name not in _IMPLEMENTATIONS:
        known = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"unknown implementation {name!r}; known: {known}.")
    return _IMPLEMENTATIONS[name]


Routes = tuple[tuple[str, str], ...]
"""For each platform that is served, the name of the implementation that runs there."""


def routes(operation: str, name: str | None, operands: tuple[Any, ...], static: Any) -> Routes:
    """Which implementation serves a case on which platform.

    Raises:
      ValueError: there is no implementation of this name.
      UnsupportedError: none does on any; the message has each one's reason.
    """
    found: dict[str, str] = {}
    reasons = []
    candidates = _IMPLEMENTATIONS.values() if name is None else [_implementation(name)]
    for candidate in candidates:
        reason = candidate.unavailable()
        if reason is None:
            kernel = candidate.kernels.get(operation)
            reason = "it has no such kernel"
            if kernel is not None:
                reason = kernel.declines(*operands, **static)
        if reason is not None:
            reasons.append(f"{candidate.name}: {reason}")
            continue
        for platform in candidate.platforms():
            found.setdefault(platform, candidate.name)
    if not found:
        raise UnsupportedError(f"no implementation serves this {operation}; {'; '.join(reasons)}")
    return tuple(sorted(found.items()))


def dispatch(
    operation: str,
    types: Any,
    *operands: Any,
    implementation: str | None = None,
    **static: Any,
) -> Any:
    """Runs an operation.

    Args:
      operation: its name.
      types: a pytree of :class:`jax.ShapeDtypeStruct`, of the results.
      *operands: pytrees of arrays.
      implementation: name of the implementation; ``None`` picks one.
      **static: what is known when the program is traced; hashable.

    Returns:
      The results, a pytree like ``types``.

    Raises:
      ValueError: the implementation is unknown.
      UnsupportedError: no implementation serves the case. Where one does, but not on the platform
        that the program is compiled for, it is raised then.
    """
    leaves, operands_tree = jax.tree.flatten(operands)
    outs, outs_tree = jax.tree.flatten(types)
    results = _operation_p.bind(
        *leaves,
        operation=operation,
        operands_tree=operands_tree,
        static=tuple(sorted(static.items())),
        routes=routes(operation, implementation, operands, static),
        types=tuple((out.shape, jax.dtypes.canonicalize_dtype(out.dtype)) for out in outs),
        mapped=(),
    )
    # A primitive's types say nothing of the axes of a shard_map: what comes from shards varies.
    return vary(jax.tree.unflatten(outs_tree, results), varying_axes(leaves))


_operation_p = jax.extend.core.Primitive("fqt_operation")
_operation_p.multiple_results = True


# A call outside of jit compiles a program of this one operation, as any other primitive's does. It
# stays one under jax.disable_jit, and where jax.debug_nans looks for the origin of a NaN.
_operation_p.def_impl(functools.partial(xla.apply_primitive, _operation_p))


@_operation_p.def_abstract_eval
def _result_types(*_: Any, types: Any, **__: Any) -> Any:
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in types]


def operation_of(equation: Any) -> tuple[str, Callable[..., Any], Any, dict[str, Any]] | None:
    """What an equation of a program is, where it is one of these operations.

    Returns:
      Its name, XLA's kernel for it, the structure of its operands and its static arguments; or
      ``None``.
    """
    if equation.primitive is not _operation_p:
        return None
    params = equation.params
    kernel = _IMPLEMENTATIONS["xla"].kernels[params["operation"]]
    return params["operation"], kernel.run, params["operands_tree"], dict(params["static"])


def _batched(leaves: Any, axes: Any, *, types: Any, mapped: Any, **params: Any) -> Any:
    size = next(
        leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None
    )
    types = tuple(((size, *shape), dtype) for shape, dtype in types)
    results = _operation_p.bind(*leaves, types=types, mapped=(*mapped, tuple(axes)), **params)
    return results, [0] * len(results)


batching.primitive_batchers[_operation_p] = _batched


def _not_differentiable(*_: Any, operation: str, **__: Any) -> Any:
    raise NotImplementedError(
        f"the kernel {operation} has no derivative of its own; fqt_jax's layers and functions "
        "have one, once and in reverse mode."
    )


ad.primitive_jvps[_operation_p] = _not_differentiable


def _lowered(
    platform: str,
    ctx: Any,
    *leaves: Any,
    operation: str,
    operands_tree: Any,
    static: Any,
    routes: Routes,
    types: Any,
    mapped: Any,
) -> Any:
    name = dict(routes).get(platform)
    if name is None:
        served: dict[str, list[str]] = {}
        for known, by in routes:
            served.setdefault(by, []).append(known)
        says = (f"{by} serves {', '.join(platforms)} only" for by, platforms in served.items())
        raise UnsupportedError(f"this {operation} is lowered for {platform}; {'; '.join(says)}.")
    kernel = _IMPLEMENTATIONS[name].kernels[operation]

    def run(*leaves: jax.Array) -> Any:
        operands = jax.tree.unflatten(operands_tree, leaves)
        return jax.tree.leaves(kernel.run(*operands, platform=platform, **dict(static)))

    for axes in mapped:
        run = jax.vmap(run, in_axes=axes)

    def checked(*leaves: jax.Array) -> Any:
        results = run(*leaves)
        found = tuple((result.shape, result.dtype) for result in results)
        if found != types:
            raise TypeError(f"{name}'s {operation} makes {found} where {types} was promised.")
        return results

    # Inside, no axis of a shard_map is known.
    plain = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
    return mlir.lower_fun(checked, multiple_results=True)(ctx.replace(avals_in=plain), *leaves)


for _name in PLATFORMS:
    mlir.register_lowering(
        _operation_p, cast(Any, functools.partial(_lowered, _name)), platform=_name
    )
