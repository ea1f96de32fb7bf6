"""Where experiments that train no single model put their results."""

from __future__ import annotations

import datetime
import json
import pathlib
from typing import Any

from experiments.cli import UserError


def output_folder(out: pathlib.Path | None, kind: str) -> pathlib.Path:
    """Creates a folder for results: ``out``, or a new one under runs/.

    Raises:
      UserError: it exists already.
      OSError: it cannot be created.
    """
    if out is None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        out = pathlib.Path("runs") / f"{kind}-{stamp}"
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"the folder {out} exists already: choose another one.") from None
    return out


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")
