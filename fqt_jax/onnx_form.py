"""A model in standard operators alone, for ONNX: signs are numbers there, and nothing is packed.

The program of a model is gone through operation by operation. Those of the library become plain
arithmetic on signs, calls are opened, and whatever depends on parameters alone is computed now.
What is left is translated by jax2onnx.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jax.extend import core

from fqt_jax.binarize import WORD_BITS, PackedBits
from fqt_jax.kernels.contract import Window
from fqt_jax.kernels.dispatch import operation_of
from fqt_jax.kernels.normed import Normed
from fqt_jax.kernels.transforms import Line
from fqt_jax.kernels.xla.float_conv import conv
from fqt_jax.kernels.xla.normed import evaluated_normed
from fqt_jax.kernels.xla.transforms import evaluated

_CALLS = ("jit", "pjit", "closed_call", "checkpoint", "custom_jvp_call", "custom_vjp_call")
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_SMALLEST = 64
"""Signs of fewer entries stay as they are."""


def write(
    function: Callable[[jax.Array], Any],
    shape: Sequence[int | str],
    path: pathlib.Path,
    metadata: dict[str, str],
) -> int:
    """Writes a function of one array as an ONNX file; see :func:`fqt_jax.export.to_onnx`."""
    onnx = _import("onnx")
    translate = _import("jax2onnx").to_onnx
    log = logging.getLogger("onnx_ir")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of shapes that nothing needs
    try:
        model = translate(in_standard_operators(function), [tuple(shape)], model_name="fqt_jax")
    finally:
        log.setLevel(level)
    _store_signs_as_int8(onnx, model.graph)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    partial = path.with_name(f"{path.name}.partial")
    try:
        onnx.save(model, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is needed for ONNX: install it with pip install 'fqt-jax[onnx]'."
        ) from error


def in_standard_operators(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function without an operation of this library.

    Example:
      >>> import fqt_jax as fqt
      >>> from flax import nnx
      >>> layer = fqt.QuantLinear(8, 4, recipe=fqt.QAT, rngs=nnx.Rngs(0))
      >>> x = jnp.linspace(-1, 1, 24).reshape(3, 8)
      >>> graphdef, state = nnx.split(layer)
      >>> same = in_standard_operators(lambda x: nnx.merge(graphdef, state, copy=True)(x))
      >>> bool(jnp.allclose(same(x), layer(x), atol=1e-5))
      True
    """

    def run(*arguments: Any) -> Any:
        closed, out = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(out), results)

    return run


def _evaluate(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def value_of(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [value_of(atom) for atom in equation.invars]
        is_known = not any(isinstance(operand, jax.core.Tracer) for operand in operands)
        sizes = [size for variable in equation.outvars for size in variable.aval.shape]
        results = None
        if is_known and not any(map(is_symbolic_dim, sizes)):
            # jax2onnx traces some functions of jax.numpy as primitives, which compute nothing.
            with contextlib.suppress(NotImplementedError), jax.ensure_compile_time_eval():
                results = _apply(equation, operands)
        if results is None:
            results = _apply(equation, operands)
        values.update(zip(equation.outvars, results, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _apply(equation: Any, operands: list[Any]) -> list[Any]:
    primitive, params = equation.primitive, equation.params
    ours = operation_of(equation)
    if ours is not None:
        name, run, operands_tree, static = ours
        each = jax.tree.unflatten(operands_tree, operands)
        plain = _ON_SIGNS.get(name)
        if plain is not None:
            return jax.tree.leaves(plain(*each, **static))
        return jax.tree.leaves(run(*each, platform="cpu", **static))
    if primitive.name in _CALLS:
        what = params.get("name")
        if what == "pack_bits":
            return operands
        if what == "unpack_bits":
            return [_unpacked(operands[0], equation.outvars[0].aval.shape)]
        inner = next(params[key] for key in _INNER if key in params)
        return _evaluate(inner.jaxpr, inner.consts, operands)
    results = primitive.bind(*operands, **params)
    return list(results) if primitive.multiple_results else [results]


# Signs take the place of the words that they would be packed into.


def _encode(source: jax.Array, line: Line, *, pool: int) -> tuple[Any, ...]:
    t = evaluated(source, line, pool)
    return t >= 0, jnp.zeros((), jnp.bool_), jnp.zeros(source.shape[:1], jnp.float32)


def _encode_normed(source: jax.Array, normed: Normed, *, epsilon: float) -> tuple[Any, ...]:
    t = evaluated_normed(source, normed, epsilon)
    return t >= 0, jnp.zeros((), jnp.bool_), jnp.zeros(source.shape[:1], jnp.float32)


def _encode_weights(w: jax.Array) -> tuple[Any, ...]:
    return w >= 0, jnp.mean(jnp.abs(w), axis=tuple(range(w.ndim - 1)))


def _forward(x: PackedBits, w: PackedBits, *, window: Window) -> jax.Array:
    return conv(_signs(x, 1), _signs(w, 0), window=window, platform="cpu")


_ON_SIGNS: dict[str, Callable[..., Any]] = {
    "encode": _encode,
    "encode_normed": _encode_normed,
    "encode_weights": _encode_weights,
    "forward": _forward,
}


def _signs(bits: PackedBits, batch_ndim: int) -> Any:
    shape = (*bits.words.shape[:batch_ndim], *bits.shape)
    values = _unpacked(bits.words, shape).reshape(shape)
    where = jnp.where if isinstance(values, jax.core.Tracer) else np.where
    return where(values, np.float32(1), np.float32(-1))


def _unpacked(words: Any, shape: Sequence[int]) -> Any:
    """The bits of a parameter's words; others are bits already."""
    if words.dtype == jnp.bool_:
        return words
    lead, length = shape[: words.ndim - 1], math.prod(shape[words.ndim - 1 :])
    shifts = np.arange(WORD_BITS, dtype=np.uint32)
    if not isinstance(words, jax.core.Tracer):
        words = np.asarray(words)
    bits = (words[..., None] >> shifts & np.uint32(1)) != np.uint32(0)
    return bits.reshape(*lead, words.shape[-1] * WORD_BITS)[..., :length].reshape(shape)


def _store_signs_as_int8(onnx: Any, graph: Any) -> None:
    """Parameters that are +1 and -1 take a byte each, and a cast where they are read."""
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if values.size < _SMALLEST or not np.all(np.abs(values) == 1):
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.int8), f"{name}_signs"))
        casts.append(
            onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT)
        )
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
