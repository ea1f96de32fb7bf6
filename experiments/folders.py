"""Folders of results, and files in them that are whole or not there."""

from __future__ import annotations

import datetime
import json
import pathlib
from typing import Any

from experiments.cli import UserError
from experiments.config import RunConfig
from fqt_jax.checkpoints import latest_checkpoint


def output_folder(out: pathlib.Path | None, kind: str) -> pathlib.Path:
    """Creates a folder for results: ``out``, or a new one under runs/.

    Raises:
      UserError: it exists already.
      OSError: it cannot be created.
    """
    return _create(out, kind, "choose another one.")


def run_folder(config: RunConfig, kind: str) -> pathlib.Path:
    """Creates the folder of a training run: that of the options, or a new one under runs/.

    Raises:
      UserError: it exists already.
      OSError: it cannot be created.
    """
    name = f"{kind}-{config.dataset}-{config.model}-{config.recipe}"
    hint = f"choose another one, or continue that run by --resume {config.out}."
    return _create(config.out, name, hint)


def _create(out: pathlib.Path | None, name: str, hint: str) -> pathlib.Path:
    if out is None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        out = pathlib.Path("runs") / f"{name}-{stamp}"
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"the folder {out} exists already: {hint}") from None
    return out


def checkpoint_at(path: pathlib.Path) -> pathlib.Path:
    """The latest checkpoint of the run in a folder, or else the path itself."""
    return latest_checkpoint(path / "checkpoints") or path


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_config(config: RunConfig, folder: pathlib.Path) -> None:
    """Writes the options to the run's folder, where resuming finds them."""
    write_json(folder / "config.json", config.to_json())
