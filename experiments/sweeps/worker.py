"""One group of a sweep in a process of its own.

    python -m experiments.sweeps.worker REQUEST

reads a group from the file REQUEST, runs its cells in order, and reports each as a line of JSON on
the standard output. Everything else goes to the standard error.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import sys
import traceback
from typing import Any, TextIO

from experiments import process
from experiments.data import Dataset
from experiments.runs import finetuning, folders, locks, runner, tasks
from experiments.sweeps.sweep import Cell, Group, Store, plan

_SAVE_SECONDS = 60.0
"""A cell that takes less is run again rather than continued."""


def main(request: dict[str, Any], reports: TextIO) -> None:
    """Runs the cells of a group that are not settled.

    Args:
      request: ``group``, ``root`` of the sweep, and the names of cells to ``skip``.
      reports: gets a line of JSON when a cell begins and when it ends.

    Raises:
      Interrupted: a signal stopped it.
    """
    group, store = Group.from_json(request["group"]), Store(pathlib.Path(request["root"]))
    done = set(request["skip"])
    sharing = _Sharing()
    for cell in plan(group, store):
        if cell.name in done or store.settled(cell):
            continue
        done.add(cell.name)
        print(json.dumps({"begin": cell.name}), file=reports, flush=True)
        report: dict[str, Any] = {"end": cell.name}
        try:
            report["summary"] = sharing.run(cell, store.folder(cell))
            (store.folder(cell) / "failure.json").unlink(missing_ok=True)
        except process.Interrupted:
            raise
        except Exception as error:
            traceback.print_exc()
            report["error"] = " ".join(str(error).split()) or type(error).__name__
            report["diverged"] = isinstance(error, runner.Diverged)
            store.fail(cell, report["error"], diverged=report["diverged"])
        print(json.dumps(report), file=reports, flush=True)


class _Sharing:
    """What the cells of a group have in common: the data and the compiled steps."""

    def __init__(self) -> None:
        self._steps: runner.SharedSteps = {}
        self._dataset: Dataset | None = None

    def run(self, cell: Cell, folder: pathlib.Path) -> dict[str, Any]:
        config = cell.config
        if self._dataset is None:
            self._dataset = tasks.load_dataset(config)
        folder.mkdir(parents=True, exist_ok=True)
        # The lock may still be with a worker of a sweep that was killed, until that one has saved.
        with locks.locked(folder, wait_for=f"runs {cell.name}"):
            task = finetuning.build_task(config, self._dataset, folder)
            folders.write_config(config, folder)
            summary = runner.train(
                config, task, folder, "finetune", shared=self._steps, save_seconds=_SAVE_SECONDS
            )
        # A sweep has hundreds of runs; what they came to is in the summary and the metrics.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return summary


if __name__ == "__main__":
    process.end_with_parent()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            main(json.loads(pathlib.Path(sys.argv[1]).read_text()), sys.__stdout__ or sys.stderr)
        except process.Interrupted as stop:
            process.stopped(stop)
