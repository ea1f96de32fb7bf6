"""A trained model as a file of packed signs, and back.

The file is one of safetensors: a bit for each binary weight in ``uint32`` words, all else in float,
norms and thresholds folded into the coefficients of :mod:`fqt_jax.frozen`.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax import export as jax_export

from fqt_jax import onnx_form
from fqt_jax.frozen import FrozenLayer, FrozenRun, Packed, freeze
from fqt_jax.modules import find_modules

FORMAT = "fqt_jax 1"


def save(
    model: Any, path: str | os.PathLike[str], description: Mapping[str, Any] | None = None
) -> int:
    """Writes the inference form of a trained model to a file, whole or not at all.

    Args:
      model: a model with layers that :func:`fqt_jax.quantize` converted, trained.
      path: of the file, which is replaced if it is there.
      description: what a reader needs besides, such as the model's name and sizes or the names of
        classes; anything that JSON holds.

    Returns:
      The size of the file in bytes.

    Raises:
      ValueError: the model has no quantized layer, or holds NaN or infinity.
      OSError: the file cannot be written.

    Example:
      >>> import tempfile, os
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> from fqt_jax import export
      >>> def make():
      ...     rngs = nnx.Rngs(0)
      ...     layers = [nnx.Linear(64, 64, rngs=rngs) for _ in range(4)]
      ...     return fqt.quantize(nnx.Sequential(*layers), fqt.FQT1)[0]
      >>> model, x = make(), jax.random.normal(jax.random.key(0), (4, 64))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.safetensors")
      ...     _ = export.save(model, path)
      ...     loaded = export.load(path, make)
      >>> bool((export.inference(loaded)(x) == nnx.jit(lambda m, x: m(x))(model, x)).all())
      True
    """
    arrays = {name: np.asarray(value) for name, value in _arrays(freeze(model)).items()}
    about = {"format": FORMAT, "description": json.dumps(dict(description or {}), sort_keys=True)}
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(safetensors.numpy.save(arrays, metadata=about))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The description in a file that :func:`save` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is none that :func:`save` wrote, or damaged.
    """
    return _read(path)[1]


def load(path: str | os.PathLike[str], make: Callable[[], Any]) -> Any:
    """Reads a file into the inference form of a model.

    Args:
      path: of a file that :func:`save` wrote.
      make: builds the quantized model whose form it is; its parameters do not matter.

    Returns:
      A module that maps what the model maps.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is none that :func:`save` wrote, damaged, or of another model; names what.
    """
    arrays, _ = _read(path)
    model = freeze(make())
    held = _arrays(model)
    wrong = [f"{name} is missing" for name in held if name not in arrays]
    wrong += [f"{name} is of no part of the model" for name in arrays if name not in held]
    wrong += [
        f"{name} is {arrays[name].dtype} {arrays[name].shape}, not {value.dtype} {value.shape}"
        for name, value in held.items()
        if name in arrays and (arrays[name].shape, arrays[name].dtype) != (value.shape, value.dtype)
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{path} is of another model: {'; '.join(wrong[:3])}{more}.")
    for name, variable in _variables(model).items():
        variable[...] = jnp.asarray(arrays[name])
    return model


def inference(model: Any) -> Callable[..., Any]:
    """The compiled function that a module in its inference form is."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: Any, *inputs: Any) -> Any:
        return nnx.merge(graphdef, state, copy=True)(*inputs)

    return lambda *inputs: run(state, *inputs)


def to_stablehlo(
    model: Any, shape: Sequence[int | str], *, platforms: Sequence[str] | None = None
) -> jax_export.Exported:
    """A quantized model as a portable program (:mod:`jax.export`), with its parameters inside.

    Native kernels are code of this library and cannot go into such a program: it is compiled for
    XLA's. Its outputs are the same numbers.

    Args:
      model: a model with layers that :func:`fqt_jax.quantize` converted, or its inference form.
      shape: of the input, ``float32``; a name stands for any size, such as ``"batch"``.
      platforms: such as ``("cpu", "cuda")``; ``None`` for that of this machine.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> import fqt_jax as fqt
      >>> from fqt_jax import export
      >>> model = fqt.QuantLinear(8, 4, recipe=fqt.QAT, rngs=nnx.Rngs(0))
      >>> program = export.to_stablehlo(model, ("batch", 8))
      >>> program.call(jnp.ones((3, 8))).shape
      (3, 4)
    """
    sizes = jax_export.symbolic_shape(", ".join(map(str, shape)))
    run = jax.jit(_portable(model))
    return jax_export.export(run, platforms=platforms)(jax.ShapeDtypeStruct(sizes, jnp.float32))


def to_onnx(
    model: Any,
    path: str | os.PathLike[str],
    shape: Sequence[int | str],
    description: Mapping[str, Any] | None = None,
) -> int:
    """Writes a quantized model as an ONNX file of standard operators, whole or not at all.

    Signs are computed as +1 and -1 in float; those of weights are stored in ``int8``, a quarter of
    float. Outputs agree to rounding.

    Args:
      model: a model with layers that :func:`fqt_jax.quantize` converted, or its inference form.
      path: of the file, which is replaced if it is there.
      shape: of the input, ``float32``, as ``("B", 224, 224, 3)``; a name stands for any size.
      description: goes into the file's metadata, as JSON.

    Returns:
      The size of the file in bytes.

    Raises:
      ImportError: jax2onnx or onnx is not installed (``pip install 'fqt-jax[onnx]'``).
      NotImplementedError: the model has an operation that jax2onnx does not know.
      OSError: the file cannot be written.
    """
    about = {"description": json.dumps(dict(description or {}), sort_keys=True)}
    return onnx_form.write(_portable(model), shape, pathlib.Path(path), about)


def _portable(model: Any) -> Callable[[Any], Any]:
    """A model's inference form as a function, without native kernels."""
    frozen = nnx.clone(model) if _is_frozen(model) else freeze(model)
    for place in find_modules(frozen, nnx.Module):
        if hasattr(place.module, "implementation"):
            place.module.implementation = "xla"
    graphdef, state = nnx.split(frozen)
    return lambda x: nnx.merge(graphdef, state, copy=True)(x)


def _is_frozen(model: Any) -> bool:
    return bool(find_modules(model, (FrozenRun, FrozenLayer)))


def _variables(model: Any) -> dict[str, nnx.Variable[Any]]:
    flat = nnx.to_flat_state(nnx.state(model))
    kinds = (nnx.Param, nnx.BatchStat, Packed)
    return {"/".join(map(str, path)): v for path, v in flat if isinstance(v, kinds)}


def _arrays(model: Any) -> dict[str, jax.Array]:
    return {name: variable[...] for name, variable in _variables(model).items()}


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is {'no file' if path.exists() else 'not there'}.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError(f"{path} was not written by fqt_jax.export.save.")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return arrays, json.loads(about["description"])
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{path} is no safetensors file, or damaged: {reason}.") from None
