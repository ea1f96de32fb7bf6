"""Named arrays in a folder, as Orbax writes them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import pathlib
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import type_handlers


def write_arrays(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays to a new folder, and reads them back.

    Whether or not that fails, nothing is being written after it.

    Raises:
      OSError: not all of what was written can be read back.
      Exception: of many types, where something cannot be written.
    """
    folder.mkdir()
    one_by_one = _OneByOne()
    orbax = _orbax(one_by_one)
    try:
        orbax.save(folder, args=ocp.args.PyTreeSave(arrays))
        orbax.finalize(folder)
    finally:
        one_by_one.wait()
    # Orbax looks for the files to merge by a search that, in some versions of Python, finds nothing
    # where a folder cannot be read: no error, and no array in the result.
    if not _holds(folder, arrays):
        raise OSError(errno.EIO, "what was written cannot be read back")


def write_shares(folder: pathlib.Path, arrays: dict[str, jax.Array]) -> None:
    """Writes arrays of which each process has a part; all of them call this with a new folder.

    Raises:
      Exception: of many types, where this process' part cannot be written.
    """
    orbax = _orbax(_OneByOne())
    if jax.process_index() == 0:
        folder.mkdir()
    multihost_utils.sync_global_devices(f"{folder} is there")
    orbax.save(folder, args=ocp.args.PyTreeSave(arrays))
    multihost_utils.sync_global_devices(f"{folder} has all parts")
    if jax.process_index() == 0:
        orbax.finalize(folder)


def read_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads what :func:`write_arrays` or :func:`write_shares` wrote, whole.

    Raises:
      Exception: of many types, where the files cannot be read or are not those of Orbax.
    """
    orbax = _orbax(_OneByOne())
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(orbax.metadata(folder).tree)
    )
    restored = orbax.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {name: np.asarray(array) for name, array in dict(restored).items()}


def _holds(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> bool:
    try:
        written = read_arrays(folder)
    except Exception:
        return False
    return written.keys() == arrays.keys() and all(
        written[name].dtype == array.dtype
        and written[name].shape == array.shape
        and written[name].tobytes() == array.tobytes()
        for name, array in arrays.items()
    )


class _OneByOne(type_handlers.NumpyHandler):
    """Writes and reads arrays as Orbax does, but each on its own, so that one can wait for all.

    Orbax gives up at the first array that fails. The others are then still on their way: into a
    folder that is being removed, and from threads that print tracebacks when they find that nobody
    waits for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._writes: list[Any] = []

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        for value, info, arg in zip(values, infos, args, strict=True):
            self._writes += await super().serialize([value], [info], [arg])
        return self._writes

    def wait(self) -> None:
        """Waits until nothing is being written any more."""
        for write in self._writes:
            with contextlib.suppress(Exception):  # Orbax has raised the first one
                write.result()

    async def deserialize(self, infos: Any, args: Any = None) -> list[Any]:
        args = args or [ocp.RestoreArgs()] * len(infos)
        read = super().deserialize
        return await _all(read([i], [arg]) for i, arg in zip(infos, args, strict=True))

    async def metadata(self, infos: Any) -> list[Any]:
        read = super().metadata
        return await _all(read([info]) for info in infos)


async def _all(calls: Iterable[Awaitable[Sequence[Any]]]) -> list[Any]:
    """The results of calls that run at once; where some fail, the first error, after all ended."""
    values: list[Any] = []
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
        values += result
    return values


def _orbax(handler: _OneByOne) -> Any:
    # Orbax reports each save and, on errors, the state of its threads; ours are one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    registry = type_handlers.create_type_handler_registry(
        (np.ndarray, handler), (jax.Array, type_handlers.ArrayHandler())
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
