"""Makes the file operations of Python fail, one after the other."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

_OPERATIONS = (
    "fsync",
    "listdir",
    "mkdir",
    "open",
    "remove",
    "rename",
    "replace",
    "rmdir",
    "scandir",
    "unlink",
    "write",
)


class Faults:
    """Counts the file operations below a folder, and calls ``fail`` at some of them.

    Args:
      folder: operations on other paths are left alone.
      fail: called before an operation; it raises, or ends the process.
      when: of the number of the operation, from 0 on: whether it fails.
    """

    def __init__(
        self, folder: pathlib.Path, fail: Callable[[str], object], when: Callable[[int], bool]
    ):
        self._folder, self._fail, self._when = str(folder), fail, when
        self.seen: list[str] = []

    @contextlib.contextmanager
    def injected(self) -> Iterator[None]:
        """Operations fail in this block."""
        places = [(os, name) for name in _OPERATIONS] + [(io, "open"), (builtins, "open")]
        originals = [(module, name, getattr(module, name)) for module, name in places]
        for module, name, original in originals:
            setattr(module, name, self._failing(name, original))
        try:
            yield
        finally:
            for module, name, original in originals:
                setattr(module, name, original)

    def _failing(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            target = args[0] if args else None
            if self._ours(target, kwargs):
                self._count(f"{name} {target}")
            result = original(*args, **kwargs)
            if name == "open" and isinstance(result, io.IOBase) and result.writable():
                return _File(result, self) if self._ours(target, kwargs) else result
            return result

        return operation

    def _ours(self, target: Any, kwargs: dict[str, Any]) -> bool:
        if isinstance(target, int):  # a descriptor, or a name in an open folder
            return os.readlink(f"/proc/self/fd/{target}").startswith(self._folder)
        if kwargs.get("dir_fd") is not None:
            return self._ours(kwargs["dir_fd"], {})
        return isinstance(target, str | os.PathLike) and os.fspath(target).startswith(self._folder)

    def _count(self, what: str) -> None:
        self.seen.append(what)
        if self._when(len(self.seen) - 1):
            self._fail(what)


class _File:
    """A file whose writes are counted."""

    def __init__(self, file: io.IOBase, faults: Faults):
        self._file, self._faults = file, faults

    def write(self, data: Any) -> int:
        self._faults._count(f"write to {self._file.name}")
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self._file.__exit__(*args)
