"""Named arrays in a folder, as Orbax writes them."""

from __future__ import annotations

import contextlib
import logging
import pathlib
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers


def write_arrays(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays to a new folder. Whether or not that fails, nothing is being written after it.

    Raises:
      Exception: of many types, where something cannot be written.
    """
    folder.mkdir()
    writer = _Writer()
    registry = type_handlers.create_type_handler_registry((np.ndarray, writer))
    handler = _orbax(type_handler_registry=registry)
    try:
        handler.save(folder, args=ocp.args.PyTreeSave(arrays))
        handler.finalize(folder)
    finally:
        writer.wait()


def read_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads back what :func:`write_arrays` wrote.

    Raises:
      Exception: of many types, where the files cannot be read or are not those of Orbax.
    """
    restored = _orbax().restore(folder, args=ocp.args.PyTreeRestore())
    return {name: np.asarray(array) for name, array in dict(restored).items()}


class _Writer(type_handlers.NumpyHandler):
    """Writes arrays as Orbax does, but each in a future of its own, so that one can wait for all.

    Orbax gives up at the first array that cannot be written. The others are then still on their
    way: into a folder that is being removed, and from threads that print tracebacks when they
    find that nobody waits for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._futures: list[Any] = []

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        for value, info, arg in zip(values, infos, args, strict=True):
            self._futures += await super().serialize([value], [info], [arg])
        return self._futures

    def wait(self) -> None:
        """Waits until nothing is being written any more."""
        for future in self._futures:
            with contextlib.suppress(Exception):  # Orbax has raised the first one
                future.result()


def _orbax(**options: Any) -> Any:
    # Orbax reports each save and, on errors, the state of its threads; ours are one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return ocp.PyTreeCheckpointHandler(**options)
