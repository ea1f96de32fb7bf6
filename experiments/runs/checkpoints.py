"""The checkpoints of a run: the last two that are whole, and the best."""

from __future__ import annotations

import contextlib
import pathlib
import re
import shutil
from typing import Any

from experiments import distributed
from experiments.cli import UserError
from fqt_jax.checkpoints import (
    CheckpointError,
    list_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from fqt_jax.training import TrainState

_REMOVED = ".removed"


class RunCheckpoints:
    """The checkpoints of a run, in a folder that no other process writes to.

    A new one is whole on the disk before an older one goes, and two are kept: where the newest is
    damaged later, the run goes on from the one before. The best one is kept besides.

    Args:
      folder: the folder; it need not exist.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._whole: list[pathlib.Path] = []

    def newest(self) -> tuple[pathlib.Path | None, list[str]]:
        """The newest checkpoint that is whole, and what is wrong with each that is newer."""
        wrong = []
        for path in list_checkpoints(self.folder):
            try:
                verify_checkpoint(path)
            except CheckpointError as error:
                wrong.append(str(error))
            else:
                self._whole = [path]
                return path, wrong
        return None, wrong

    def at(self, step: int) -> pathlib.Path:
        """Where the checkpoint of a step is, if there is one."""
        return self.folder / f"step_{step:08d}"

    def save(self, state: TrainState, metadata: dict[str, Any], *, best: int | None = None) -> None:
        """Saves a state, unless it is saved already; then removes all but the last two and one.

        Of several processes the first writes, and each its part of what they share out; all wait
        for each other.

        Args:
          state: the state.
          metadata: of :func:`fqt_jax.checkpoints.save_checkpoint`.
          best: the step whose checkpoint is kept too, if there is one.

        Raises:
          CheckpointError: it cannot be saved; the checkpoints before it are still there.
          OSError: a damaged one of that step cannot be removed.
        """
        path = self.at(int(state.step))
        if path not in self._whole:
            # A damaged one, newer than that which the run was resumed from.
            if distributed.first() and path.exists():
                _remove(path)
            save_checkpoint(path, state, metadata)
            self._whole = [*self._whole[-1:], path]
        if distributed.first():
            with contextlib.suppress(OSError):
                # What is left does no harm, and goes at the next save.
                self._remove_others([*self._whole, *([] if best is None else [self.at(best)])])
        distributed.wait_for_all(f"{path.name} is saved")

    def _remove_others(self, kept: list[pathlib.Path]) -> None:
        """Removes older and damaged ones, and what is left of saves that were killed."""
        for other in self.folder.iterdir():
            if re.fullmatch(r"step_\d+(\.\w+)*", other.name) and other not in kept:
                _remove(other)


def _remove(path: pathlib.Path) -> None:
    """Removes a checkpoint; it loses its name first, so that no part of it looks like one."""
    doomed = path
    if path.suffix != _REMOVED:
        doomed = path.with_name(path.name + _REMOVED)
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    shutil.rmtree(doomed)


def check_nothing_is_lost(run: pathlib.Path, wrong: list[str], *, epochs_are_saved: bool) -> None:
    """Refuses to start a run again where something was saved that is not there any more.

    Args:
      run: its folder, with no checkpoint that is whole.
      wrong: what is said of those that are damaged.
      epochs_are_saved: whether each epoch leaves a checkpoint.

    Raises:
      UserError: there was a checkpoint.
    """
    folder, metrics = run / "checkpoints", run / "metrics.jsonl"
    if wrong:
        reasons = "; ".join(message.rstrip(".") for message in wrong)
        lost = f"none of its checkpoints can be read: {reasons}."
    elif metrics.exists() and epochs_are_saved:
        epochs = metrics.read_bytes().count(b"\n")
        lost = f"it was trained for {epochs} epochs, but {folder} has no checkpoint."
    else:
        return
    raise UserError(
        f"cannot resume {run}: {lost} Put a checkpoint back there, or begin again in another "
        "folder."
    )
