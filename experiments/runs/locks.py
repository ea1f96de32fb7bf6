"""A lock on a folder, held by one process at a time, which ends with that process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator

from experiments.cli import UserError

NAME = ".lock"
"""The file that is locked. It stays, and may stay after a kill: the lock is not its existence."""


@contextlib.contextmanager
def locked(folder: pathlib.Path, *, wait_for: str = "") -> Iterator[None]:
    """Holds the lock on a folder, which exists.

    Args:
      folder: the folder.
      wait_for: what another process that holds the lock is doing. If given, that is printed and
        waited for; if not, the lock is refused.

    Raises:
      UserError: another process holds the lock, or the file system knows no locks.
      OSError: the folder cannot be written.
    """
    with (folder / NAME).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait_for:
                raise UserError(
                    f"{folder} is in use by another process{_holder(file.fileno())}."
                ) from None
            print(f"waiting for another process{_holder(file.fileno())}, which {wait_for}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be locked against other processes ({error.strerror}): choose "
                "one on another file system."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _holder(descriptor: int) -> str:
    """The process that holds a lock, as it wrote it a moment after it got it."""
    text = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
    return f" (pid {text})" if text.isdecimal() else ""
