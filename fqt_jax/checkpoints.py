"""Saves and restores training states and parameters, on Orbax.

A checkpoint is a folder with two parts: ``state``, every array of a
:class:`~fqt_jax.training.TrainState` under a readable name (``params.blocks.0.conv1.kernel``),
and ``metadata``, JSON. Orbax writes it beside its final name and renames it, so a checkpoint is
there whole or not at all. ``sizes.json`` says how long each of its files is.
"""

from __future__ import annotations

import json
import logging
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from fqt_jax.training import TrainState
from fqt_jax.tree import leaf_name

Path = str | pathlib.Path

_FORMAT = 1
_SIZES = "sizes.json"


class CheckpointError(Exception):
    """A checkpoint cannot be written or read. The message is one line that says why."""


def save_checkpoint(path: Path, state: TrainState, metadata: dict[str, Any]) -> None:
    """Writes a checkpoint to a new folder.

    Args:
      path: the folder; it must not exist.
      state: the training state; it is not donated.
      metadata: what else to keep; JSON values only.

    Raises:
      CheckpointError: the folder exists or cannot be written. Nothing is left behind.
    """
    path = pathlib.Path(path).absolute()
    if path.exists():
        raise CheckpointError(f"{path} exists already.")
    arrays = {name: np.asarray(_storable(leaf)) for name, leaf in _named_leaves(state)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _checkpointer() as checkpointer:
            checkpointer.save(
                path,
                ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays),
                    metadata=ocp.args.JsonSave({"format": _FORMAT, **metadata}),
                ),
            )
        (path / _SIZES).write_text(json.dumps(_sizes(path)))
    except Exception as error:
        for partial in path.parent.glob(f"{path.name}*"):
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"cannot write the checkpoint {path}: {_one_line(error)}") from error


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint.

    Raises:
      CheckpointError: there is no checkpoint at ``path``, it is damaged, or of another format.
    """
    path = _existing(path)
    try:
        with _checkpointer() as checkpointer:
            restored = checkpointer.restore(
                path, ocp.args.Composite(metadata=ocp.args.JsonRestore())
            )
        metadata = dict(restored["metadata"])
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a checkpoint, or is damaged: {_one_line(error)}"
        ) from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} has the format {metadata.get('format')!r}; this version reads {_FORMAT}."
        )
    return metadata


def restore_checkpoint(path: Path, template: TrainState) -> TrainState:
    """Reads back a whole training state.

    Args:
      path: the checkpoint.
      template: a state of the same model and optimizer; only its structure is used.

    Returns:
      The state as it was saved, bit for bit.

    Raises:
      CheckpointError: the checkpoint is missing or damaged, or belongs to another model or
        optimizer.
    """
    arrays = _read_arrays(path)
    leaves = []
    for name, leaf in _named_leaves(template):
        expected = _storable(leaf)
        if name not in arrays:
            raise CheckpointError(f"{path} has no {name}: it is of another model or optimizer.")
        array = arrays.pop(name)
        if array.shape != expected.shape or array.dtype != expected.dtype:
            raise CheckpointError(
                f"{path} is of another model: {name} is {array.dtype}{list(array.shape)}, "
                f"expected {expected.dtype}{list(expected.shape)}."
            )
        value = jnp.asarray(array)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        leaves.append(value)
    if arrays:
        raise CheckpointError(
            f"{path} is of another model or optimizer: it also has {next(iter(arrays))}."
        )
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def load_parameters(path: Path, model: nnx.Module, *, new_head: str | None = None) -> list[str]:
    """Loads parameters and batch statistics into a model, in place; the rest stays as it is.

    Float and quantized models have the same parameters, so a checkpoint of either loads into the
    other. Learned weight scales that the checkpoint lacks start from the loaded weights' means.

    Args:
      path: the checkpoint.
      model: the model to fill.
      new_head: prefix of the parameters that keep their values if, and only if, the checkpoint's
        differ in shape, such as ``"head"`` for another number of classes.

    Returns:
      The names of the parameters that kept their values under ``new_head``.

    Raises:
      CheckpointError: the checkpoint is missing or damaged, or belongs to another model.
    """
    arrays = _read_arrays(path)
    saved = {
        name.split(".", 1)[1]: array
        for name, array in arrays.items()
        if name.startswith(("params.", "others."))
    }
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    named = [(leaf_name(key), value) for key, value in jax.tree_util.tree_leaves_with_path(state)]
    loaded, kept = [], []
    for name, value in named:
        array = saved.get(name)
        if array is not None and array.shape == value.shape and array.dtype == value.dtype:
            loaded.append(jnp.asarray(array))
        elif array is None and _is_learned_scale(name, saved):
            kernel = saved[f"{name.removesuffix('.scale')}.kernel"]
            loaded.append(jnp.asarray(np.abs(kernel).mean(axis=tuple(range(kernel.ndim - 1)))))
        elif array is not None and new_head and name.startswith(f"{new_head}."):
            loaded.append(value)
            kept.append(name)
        elif array is None:
            raise CheckpointError(f"{path} is of another model: it has no {name}.")
        else:
            raise CheckpointError(
                f"{path} is of another model: {name} is {array.dtype}{list(array.shape)}, "
                f"expected {value.dtype}{list(value.shape)}."
            )
    unknown = {name.split(".", 1)[1] for name in arrays if name.startswith("params.")} - {
        name for name, _ in named
    }
    unknown = {name for name in unknown if not _is_learned_scale(name, saved)}
    if unknown:
        raise CheckpointError(f"{path} is of another model: it also has {min(unknown)}.")
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), loaded))
    return kept


def latest_checkpoint(folder: Path) -> pathlib.Path | None:
    """The checkpoint ``step_N`` of the greatest ``N`` in a folder; ``None`` if there is none."""
    found = [
        (int(path.name.removeprefix("step_")), path)
        for path in pathlib.Path(folder).glob("step_*")
        if path.name.removeprefix("step_").isdecimal()
    ]
    return max(found)[1] if found else None


def _is_learned_scale(name: str, saved: dict[str, np.ndarray]) -> bool:
    """A layer's learned weight scale; batch norm has a ``scale`` too, but no ``kernel``."""
    return name.endswith(".scale") and f"{name.removesuffix('.scale')}.kernel" in saved


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    read_metadata(path)
    path = _existing(path)
    try:
        with _checkpointer() as checkpointer:
            restored = checkpointer.restore(
                path, ocp.args.Composite(state=ocp.args.StandardRestore())
            )
        return {name: np.asarray(array) for name, array in dict(restored["state"]).items()}
    except Exception as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {_one_line(error)}") from error


def _existing(path: Path) -> pathlib.Path:
    """The folder of a checkpoint, all of whose files are as long as they were.

    Orbax finds a file that was cut short too, but its readers' threads then print tracebacks.
    """
    path = pathlib.Path(path).absolute()
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}.")
    if (path / _SIZES).exists():
        found = _sizes(path)
        try:
            expected = dict(json.loads((path / _SIZES).read_text()))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"the checkpoint {path} is damaged: {_SIZES}: {error}") from None
        for name, size in expected.items():
            if found.get(name) != size:
                has = f"has {found[name]} bytes of {size}" if name in found else "is missing"
                raise CheckpointError(f"the checkpoint {path} is damaged: {name} {has}.")
    return path


def _sizes(path: pathlib.Path) -> dict[str, int]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != _SIZES)
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in files}


def _checkpointer() -> Any:
    # Orbax reports each save and, on errors, the state of its threads; ours are one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _named_leaves(state: TrainState) -> list[tuple[str, jax.Array]]:
    return [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]


def _storable(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
