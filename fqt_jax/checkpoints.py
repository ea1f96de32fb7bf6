"""Saves and restores training states and parameters, on Orbax.

A checkpoint is a folder: ``state`` has every array of a :class:`~fqt_jax.training.TrainState`
under a readable name (``params.blocks.0.conv1.kernel``), as Orbax writes it, and ``shares`` those
of which each of several processes has written its part; ``metadata.json`` is JSON; ``SHA256SUMS``
has the checksums of all files. It is written beside its final name, then renamed: a checkpoint is
there whole or not at all. Every read compares the checksums first.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fqt_jax import checksums
from fqt_jax.array_files import read_arrays, write_arrays, write_shares
from fqt_jax.layer_types import quantized_layers
from fqt_jax.training import TrainState
from fqt_jax.tree import leaf_name

Path = str | pathlib.Path

_FORMAT = 2
_STATE, _SHARES, _METADATA, _PARTIAL = "state", "shares", "metadata.json", ".partial"


class CheckpointError(Exception):
    """A checkpoint cannot be written or read. The message is one line that says why."""


def save_checkpoint(path: Path, state: TrainState, metadata: dict[str, Any]) -> None:
    """Writes a checkpoint to a new folder.

    Until all of it is on the disk, the folder has another name, with ``.partial`` at its end; that
    is all that a killed process leaves behind.

    With several processes all call this. The first writes; of arrays of which each process has a
    part, each writes its own.

    Args:
      path: the folder; it must not exist.
      state: the training state; it is not donated.
      metadata: what else to keep; JSON values only.

    Raises:
      CheckpointError: the folder exists or cannot be written. No part of it is left behind.
    """
    path = pathlib.Path(path).absolute()
    is_first = jax.process_index() == 0
    if is_first and path.exists():
        raise CheckpointError(f"{path} exists already.")
    partial = path.with_name(path.name + _PARTIAL)
    leaves = [(name, _storable(leaf)) for name, leaf in _named_leaves(state)]
    shares = {name: leaf for name, leaf in leaves if not _is_readable(leaf)}
    try:
        if is_first:
            arrays = {name: np.asarray(leaf) for name, leaf in leaves if name not in shares}
            text = json.dumps({"format": _FORMAT, **metadata})
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            (partial / _METADATA).write_text(text)
            write_arrays(partial / _STATE, arrays)
        if shares:
            write_shares(partial / _SHARES, shares)
        if is_first:
            checksums.seal(partial)
            partial.rename(path)
            checksums.sync(path.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(f"cannot write the checkpoint {path}: {_reason(error)}") from error


def verify_checkpoint(path: Path) -> None:
    """Reads all of a checkpoint and compares its checksums.

    Raises:
      CheckpointError: there is no checkpoint at ``path``, or it is damaged; the message names the
        files that are missing, were changed, or are not part of it.
    """
    path = pathlib.Path(path).absolute()
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}.")
    if not (path / checksums.SUMS).exists():
        raise CheckpointError(
            f"{path} is not a checkpoint, or is damaged: it has no {checksums.SUMS}."
        )
    try:
        damage = checksums.damage(path)
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {_reason(error)}") from error
    if damage:
        raise CheckpointError(f"the checkpoint {path} is damaged: {damage}.")


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint.

    Raises:
      CheckpointError: there is no checkpoint at ``path``, it is damaged, or of another format.
    """
    path = pathlib.Path(path).absolute()
    verify_checkpoint(path)
    try:
        metadata = dict(json.loads((path / _METADATA).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {_reason(error)}") from error
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
    other. Where training averaged the parameters (:mod:`fqt_jax.averaging`), the average is loaded.
    Learned weight scales that the checkpoint lacks start as the recipe says, from the loaded
    weights' means or from 1. Thresholds of signs that only one of the two has are left out
    (:func:`fqt_jax.calibrate`).

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
    averaged = "opt_state.average."
    saved |= {
        name.removeprefix(averaged): array
        for name, array in arrays.items()
        if name.startswith(averaged)
    }
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    named = [(leaf_name(key), value) for key, value in jax.tree_util.tree_leaves_with_path(state)]
    from_one = {
        f"{place.path.replace('/', '.')}.scale".lstrip(".")
        for place in quantized_layers(model)
        if place.module.recipe.scale == "learned_from_one"
    }
    loaded, kept = [], []
    for name, value in named:
        array = saved.get(name)
        if array is not None and array.shape == value.shape and array.dtype == value.dtype:
            loaded.append(jnp.asarray(array))
        elif array is None and _is_learned_scale(name, saved) and name in from_one:
            loaded.append(jnp.ones_like(value))
        elif array is None and _is_learned_scale(name, saved):
            kernel = saved[f"{name.removesuffix('.scale')}.kernel"]
            loaded.append(jnp.asarray(np.abs(kernel).mean(axis=tuple(range(kernel.ndim - 1)))))
        elif array is None and _is_threshold(name, saved):
            loaded.append(value)
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
    unknown = {
        name
        for name in unknown
        if not _is_learned_scale(name, saved) and not _is_threshold(name, saved)
    }
    if unknown:
        raise CheckpointError(f"{path} is of another model: it also has {min(unknown)}.")
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), loaded))
    return kept


def nonfinite_arrays(state: TrainState) -> list[str]:
    """Names of the floating-point arrays of a state that have a value which is not finite.

    Of an array of which each of several processes has a part, this process' part is looked at.

    Example:
      >>> import jax.numpy as jnp
      >>> from fqt_jax.training import Metrics, TrainState
      >>> params = {"head": {"kernel": jnp.array([1.0, jnp.nan]), "bias": jnp.zeros(2)}}
      >>> state = TrainState(params, {}, {}, jnp.zeros((), jnp.int32), Metrics.zero())
      >>> nonfinite_arrays(state)
      ['params.head.kernel']
    """
    # On the host, where saving needs the arrays too: to compile this takes far longer than to run.
    return [
        name
        for name, leaf in _named_leaves(state)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
        and not all(np.isfinite(part).all() for part in _own_parts(leaf))
    ]


def list_checkpoints(folder: Path) -> list[pathlib.Path]:
    """The checkpoints ``step_N`` in a folder, whole or damaged, of the greatest ``N`` first.

    Raises:
      OSError: the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = {name: int(name[5:]) for name in names if re.fullmatch(r"step_[0-9]+", name)}
    return [pathlib.Path(folder, name) for name in sorted(steps, key=steps.__getitem__)[::-1]]


def latest_checkpoint(folder: Path) -> pathlib.Path | None:
    """The first of :func:`list_checkpoints`, which may be damaged; ``None`` if there is none."""
    return next(iter(list_checkpoints(folder)), None)


def _is_learned_scale(name: str, saved: dict[str, np.ndarray]) -> bool:
    """A layer's learned weight scale; batch norm has a ``scale`` too, but no ``kernel``."""
    return name.endswith(".scale") and f"{name.removesuffix('.scale')}.kernel" in saved


def _is_threshold(name: str, saved: dict[str, np.ndarray]) -> bool:
    layer, _, last = name.rpartition(".")
    return last in ("threshold", "spread") and f"{layer}.kernel" in saved


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    read_metadata(path)
    path = pathlib.Path(path).absolute()
    try:
        arrays = read_arrays(path / _STATE)
        if (path / _SHARES).exists():
            arrays |= read_arrays(path / _SHARES)
        return arrays
    except Exception as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {_reason(error)}") from error


def _named_leaves(state: TrainState) -> list[tuple[str, jax.Array]]:
    return [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]


def _is_readable(leaf: Any) -> bool:
    """Whether this process can read the whole array."""
    return (
        not isinstance(leaf, jax.Array)
        or leaf.is_fully_addressable
        or leaf.sharding.is_fully_replicated
    )


def _own_parts(leaf: Any) -> list[np.ndarray]:
    if _is_readable(leaf):
        return [np.asarray(leaf)]
    return [np.asarray(shard.data) for shard in leaf.addressable_shards]


def _storable(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _reason(error: BaseException) -> str:
    """An error in one line: of the system, what it says; of another kind, what it is too."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    if code := re.search(r"os_error_code='(\d+)'", text):  # as TensorStore writes it
        return os.strerror(int(code[1]))
    return f"{type(error).__name__}: {text[:200]}"
