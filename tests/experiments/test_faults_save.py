"""Saves in which a file operation fails, or at which the process ends: each of them in turn."""

import errno
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from experiments.runs.checkpoints import RunCheckpoints
from fqt_jax.checkpoints import CheckpointError
from tests.experiments.faults import Faults
from tests.experiments.saves import KILLED, begin, goes_on, newest, operations, save, state

pytestmark = pytest.mark.skipif(
    not pathlib.Path("/proc/self/fd").exists(), reason="tells the paths of open files by /proc"
)
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def root() -> Iterator[pathlib.Path]:
    """A folder in memory, where there is one: Orbax waits for the disk in each of its writes."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield pathlib.Path(folder)


# A disk that is full stays full: failures that pass are the rarer case.
@pytest.mark.parametrize(
    "once",
    [True, False],
    ids=["once", "from_then_on"],
)
@pytest.mark.slow
def test_whatever_fails_a_good_checkpoint_is_left(root, once):
    def fail():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    begin(root / "begun")
    shutil.copytree(root / "begun", root / "first")
    steps = []
    for k, operation in enumerate(operations(root / "first")):
        folder = root / str(k)
        shutil.copytree(root / "begun", folder)
        checkpoints = RunCheckpoints(folder)
        checkpoints.newest()
        faults = Faults(folder, operation, fail, once=once)
        message = ""
        with faults.injected():
            try:
                save(checkpoints, 3)
            except CheckpointError as error:
                message = str(error)
        steps.append(newest(folder))
        if message:
            reasons = (os.strerror(errno.ENOSPC), "what was written cannot be read back")
            assert message.endswith(reasons), operation
        else:
            assert steps[-1] == 3, operation
        # How many files Orbax writes differs a little from save to save.
        assert faults.reached or "*" in operation, operation
        goes_on(folder)
    assert len(steps) > 50
    assert (steps[0], steps[-1]) == (2, 3)


@pytest.mark.slow
def test_wherever_it_is_killed_a_good_checkpoint_is_left(root):
    result = subprocess.run(
        [sys.executable, "-m", "tests.experiments.saves", str(root)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.stderr == ""
    assert result.returncode == 0
    steps = []
    for k, line in enumerate(result.stdout.splitlines()):
        assert line.startswith(f"{KILLED} ") or "*" in line, line
        steps.append(newest(root / str(k)))
        goes_on(root / str(k))
    assert len(steps) > 50
    assert (steps[0], steps[-1]) == (2, 3)


def test_the_last_two_and_the_best_are_kept(root):
    checkpoints = RunCheckpoints(root)
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 5), (6, 9)):
        checkpoints.save(state(step), {}, best=best)
        kept = {best, step, step - 1} - {None, 0, 9}
        assert {path.name for path in root.iterdir()} == {f"step_{k:08d}" for k in kept}
