"""Makes the file operations of Python fail, one after the other."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pathlib
import re
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
    """Calls ``fail`` at one of the file operations below a folder, or from one on.

    Args:
      folder: operations on other paths are left alone.
      at: the operation, as ``seen`` has it; none fails if it does not occur.
      fail: called before the operation; it raises, or ends the process.
      once: whether those after it succeed.

    Attributes:
      seen: what was done so far. Files that Orbax names at random have the name ``*``.
      reached: whether ``at`` has occurred.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        at: str = "",
        fail: Callable[[], object] = lambda: None,
        *,
        once: bool = True,
    ):
        self._folder, self._at, self._fail, self._once = str(folder), at, fail, once
        self.seen: list[str] = []
        self.reached = False

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
            path = self._path(args[0] if args else None, kwargs.get("dir_fd"))
            if path is None:
                return original(*args, **kwargs)
            self.count(name, path)
            if name == "fsync":  # it takes long, and no power is lost here
                return None
            result = original(*args, **kwargs)
            if isinstance(result, io.IOBase) and result.writable():
                return _File(result, path, self)
            return result

        return operation

    def _path(self, target: Any, folder: int | None) -> str | None:
        """What an operation is on, relative to the folder; None if it is elsewhere."""
        if isinstance(target, int):
            target = os.readlink(f"/proc/self/fd/{target}")
        elif folder is not None:
            target = f"{os.readlink(f'/proc/self/fd/{folder}')}/{target}"
        if not isinstance(target, str | os.PathLike):
            return None
        path = os.fspath(target)
        return path.removeprefix(self._folder) if path.startswith(self._folder) else None

    def count(self, name: str, path: str) -> None:
        """Takes note of an operation, and lets it fail if its turn has come."""
        what = f"{name} {re.sub('[0-9a-f]{32}', '*', path)}"
        what += f" {sum(seen.startswith(f'{what} ') for seen in self.seen)}"
        self.seen.append(what)
        if what == self._at or (self.reached and not self._once):
            self.reached = True
            self._fail()


class _File:
    """A file whose writes are counted."""

    def __init__(self, file: Any, path: str, faults: Faults):
        self._file, self._path, self._faults = file, path, faults

    def write(self, data: Any) -> Any:
        self._faults.count("write", self._path)
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
