"""A run that saves small states, and what must hold of its folder whatever befell a save.

    python -m tests.experiments.saves FOLDER

ends a process at each file operation of a save in turn, and prints the exit statuses.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.runs.checkpoints import RunCheckpoints
from fqt_jax.checkpoints import read_metadata, restore_checkpoint
from fqt_jax.training import Metrics, TrainState
from tests.experiments.faults import Faults

KILLED = 9


def state(step: int) -> TrainState:
    """A state whose arrays are on the host: no thread is started to make it."""
    rng = np.random.default_rng(step)
    params = {name: rng.normal(size=(5, 4)).astype(np.float32) for name in ("kernel", "bias")}
    zero = {"loss": np.zeros((), np.float32)}
    return TrainState(params, {}, {}, np.asarray(step, np.int32), Metrics(zero, dict(zero)))


def save(checkpoints: RunCheckpoints, step: int) -> None:
    """Saves the state of a step."""
    checkpoints.save(state(step), {"step": step})


def begin(folder: pathlib.Path) -> None:
    """Saves steps 1 and 2, with leftovers of saves that were killed beside them."""
    checkpoints = RunCheckpoints(folder)
    for step in (1, 2):
        save(checkpoints, step)
    for name in ("step_00000003.partial", "step_00000000.removed"):
        (folder / name).mkdir()
        (folder / name / "file").touch()


def newest(folder: pathlib.Path) -> int:
    """The step of the newest checkpoint, which is whole, after a comparison of all it holds."""
    path, wrong = RunCheckpoints(folder).newest()
    assert path is not None
    assert wrong == []
    step: int = read_metadata(path)["step"]
    assert path.name == f"step_{step:08d}"
    restored, expected = (
        jax.tree.leaves(s) for s in (restore_checkpoint(path, state(0)), state(step))
    )
    for got, wanted in zip(restored, expected, strict=True):
        assert np.asarray(got).tobytes() == wanted.tobytes()
    return step


def goes_on(folder: pathlib.Path) -> None:
    """The next save leaves two checkpoints and nothing else."""
    checkpoints = RunCheckpoints(folder)
    path, _ = checkpoints.newest()
    assert path is not None
    save(checkpoints, 4)
    assert sorted(p.name for p in folder.iterdir()) == [path.name, "step_00000004"]
    assert newest(folder) == 4


def operations(folder: pathlib.Path) -> list[str]:
    """The file operations of the save of step 3."""
    checkpoints = RunCheckpoints(folder)
    checkpoints.newest()
    faults = Faults(folder)
    with faults.injected():
        save(checkpoints, 3)
    return faults.seen


def in_child(act: Callable[..., int | None], *arguments: Any) -> int:
    """Exit status of a forked process that does something."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(act(*arguments) or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_save(folder: pathlib.Path, operation: str) -> None:
    """A save that ends its process at one of its operations."""
    checkpoints = RunCheckpoints(folder)
    checkpoints.newest()
    with Faults(folder, operation, lambda: os._exit(KILLED)).injected():
        save(checkpoints, 3)


def main(root: pathlib.Path) -> None:
    """Ends a process at each operation of a save; folder ``k`` is what the ``k``-th one left."""
    listed = root / "operations"

    def prepare() -> None:
        begin(root / "begun")
        shutil.copytree(root / "begun", root / "first")
        listed.write_text("\n".join(operations(root / "first")))

    assert in_child(prepare) == 0
    for k, operation in enumerate(listed.read_text().splitlines()):
        folder = root / str(k)
        shutil.copytree(root / "begun", folder)
        print(in_child(killed_save, folder, operation), operation, flush=True)


if __name__ == "__main__":
    # Nothing in this process has started a thread when it forks.
    warnings.filterwarnings("ignore", "os.fork")
    main(pathlib.Path(sys.argv[1]))
