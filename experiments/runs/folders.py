"""Folders of results, and files in them that are whole or not there."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import pathlib
import shlex
import shutil
from collections.abc import Iterator
from typing import Any

from experiments import distributed, process
from experiments.cli import UserError
from experiments.runs import locks
from experiments.runs.config import RunConfig
from fqt_jax.checkpoints import latest_checkpoint

_CONFIG = "config.json"
_PARTIAL = ".partial"


def output_folder(out: pathlib.Path | None, kind: str) -> pathlib.Path:
    """Creates a folder for results: ``out``, or a new one under runs/.

    An empty folder will do, such as a process leaves that was killed at this place.

    Raises:
      UserError: there is something in it.
      OSError: it cannot be created.
    """
    folder = _make(out, kind)
    _check_fresh(folder)
    return folder


def run_folder(config: RunConfig, kind: str, *, resumable: bool = False) -> pathlib.Path:
    """Creates the folder of a training run, with its options in it: ``config.out``, or a new one.

    Raises:
      UserError: there is something in it, or another process is about to use it.
      OSError: it cannot be created.
    """
    folder = _make(config.out, f"{kind}-{config.dataset}-{config.model}-{config.recipe}")
    _check_fresh(folder, resumable)  # before the lock, which leaves a file
    with locks.locked(folder):
        _check_fresh(folder, resumable)
        write_config(config, folder)
    return folder


def check_can_start(config: RunConfig) -> None:
    """Refuses a folder before data and model are made that :func:`run_folder` would refuse after.

    Raises:
      UserError, OSError: as :func:`run_folder`.
    """
    if config.out is None or not distributed.first():
        return
    missing = [path for path in (config.out, *config.out.parents) if not path.exists()]
    _check_fresh(_make(config.out, ""), resumable=True)
    for path in missing:  # the innermost first
        # Of several processes that check one parent, the last takes it away.
        with contextlib.suppress(OSError):
            path.rmdir()


def _check_fresh(folder: pathlib.Path, resumable: bool = False) -> None:
    """Refuses a folder that holds more than a killed process leaves before its options."""
    if {path.name for path in folder.iterdir()} <= {locks.NAME, _CONFIG + _PARTIAL}:
        return
    hint = "choose another one"
    if resumable and (folder / _CONFIG).exists():
        hint += f", or continue that run by --resume {shlex.quote(str(folder))}"
    raise UserError(f"the folder {folder} exists already: {hint}.")


def _make(out: pathlib.Path | None, name: str) -> pathlib.Path:
    """Creates ``out`` where it does not exist, or a folder that did not exist under runs/."""
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UserError(f"{out} exists already and is not a folder.") from None
        return out
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        folder = pathlib.Path("runs", f"{name}-{stamp}" + (f"-{number}" if number > 1 else ""))
        # Of several processes that start in one second, one can make a folder of that name.
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
        if not os.path.lexists(folder):
            raise UserError(f"{folder.parent} is not a folder.")
    raise AssertionError


@contextlib.contextmanager
def continuing(folder: pathlib.Path, kind: str) -> Iterator[None]:
    """Holds the folder of a run, and tells who stops the process from here on how to continue.

    Raises:
      UserError: another process holds it.
      OSError: it cannot be written.
    """
    hint = f"continue by: {process.command(kind)} --resume {shlex.quote(str(folder))}"
    # Of several processes the first holds it for all.
    with locks.locked(folder) if distributed.first() else contextlib.nullcontext():
        process.if_stopped(hint)
        distributed.tell_how_to_go_on(hint)
        yield


@contextlib.contextmanager
def starting(config: RunConfig, kind: str) -> Iterator[pathlib.Path]:
    """Creates and holds the folder of a new run.

    A run that ends in an error before its first checkpoint leaves no folder: some options show
    only in compiling or in the first epoch that they do not serve.

    Raises:
      UserError, OSError: as :func:`run_folder`.
    """
    made = run_folder(config, kind, resumable=True) if distributed.first() else None
    folder = distributed.from_first(made)
    with continuing(folder, kind):
        try:
            yield folder
        except process.Interrupted:
            raise
        except Exception:
            if distributed.first() and latest_checkpoint(folder / "checkpoints") is None:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def checkpoint_at(path: pathlib.Path) -> pathlib.Path:
    """The checkpoint of the run in a folder that was tested, else the latest, else the path."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        tested = json.loads((path / "summary.json").read_text())["checkpoint"]
        if (path / "checkpoints" / tested).is_dir():
            return path / "checkpoints" / tested
    return latest_checkpoint(path / "checkpoints") or path


def finished(folder: pathlib.Path) -> bool:
    """Whether the run in a folder is complete, its checkpoint included."""
    checkpoint = latest_checkpoint(folder / "checkpoints")
    return checkpoint is not None and (folder / "summary.json").exists()


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all; of several processes, the first does."""
    if not distributed.first():
        return
    partial = path.with_name(path.name + _PARTIAL)
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # or the new name could outlive a power failure without the text
    partial.replace(path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_config(config: RunConfig, folder: pathlib.Path) -> None:
    """Writes the options to the run's folder, where resuming finds them."""
    write_json(folder / _CONFIG, config.to_json())
