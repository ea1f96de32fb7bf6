"""Checksums of all files of a folder, so that damage to any of them is found.

They stand in a file of their own, in the format of ``sha256sum``: ``sha256sum -c SHA256SUMS``
checks them too. Its last line is the checksum of the lines above it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pathlib
from collections.abc import Iterator

SUMS = "SHA256SUMS"


def seal(folder: pathlib.Path) -> None:
    """Writes the checksums of a folder's files, and waits until all of it is on the disk.

    Raises:
      OSError: a file cannot be read, or the checksums cannot be written.
    """
    (folder / SUMS).write_bytes(_with_own_sum(_lines(_sums(folder))))
    for root, files in _walk(folder):
        for path in (*(root / name for name in files), root):
            sync(path)


def damage(folder: pathlib.Path) -> str | None:
    """What differs from the time when the folder was sealed; None if nothing does.

    Raises:
      OSError: a file cannot be read.
    """
    written = (folder / SUMS).read_bytes()
    body = written[: written.rfind(b"\n", 0, -1) + 1]
    if written != _with_own_sum(body):
        return f"changed: {SUMS}"
    lines = (line.split("  ", 1) for line in body.decode().splitlines())
    expected = {name: digest for digest, name in lines}
    found = _sums(folder)
    different = {
        "missing": expected.keys() - found.keys(),
        "not part of it": found.keys() - expected.keys(),
        "changed": {
            name for name in expected.keys() & found.keys() if found[name] != expected[name]
        },
    }
    return (
        "; ".join(f"{what}: {_some(names)}" for what, names in different.items() if names) or None
    )


def sync(path: pathlib.Path) -> None:
    """Waits until a file or the entries of a folder are on the disk.

    Raises:
      OSError: they cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do so for folders, and need not.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def _sums(folder: pathlib.Path) -> dict[str, str]:
    sums = {}
    for root, files in _walk(folder):
        for path in (root / name for name in files):
            if path != folder / SUMS:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                sums[path.relative_to(folder).as_posix()] = digest
    return dict(sorted(sums.items()))


def _walk(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, list[str]]]:
    """The folders below one, with the names of their files; one that cannot be read is an error."""

    def stop(error: OSError) -> None:
        raise error

    for root, _, files in os.walk(folder, onerror=stop):
        yield pathlib.Path(root), files


def _lines(sums: dict[str, str]) -> bytes:
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()


def _with_own_sum(lines: bytes) -> bytes:
    return lines + f"# {hashlib.sha256(lines).hexdigest()}\n".encode()


def _some(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first
