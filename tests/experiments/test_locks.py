import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from experiments.cli import UserError
from experiments.runs.locks import locked

ROOT = pathlib.Path(__file__).parents[2]

HOLD = """
import pathlib, sys
from experiments.runs.locks import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock on the folder until its standard input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_is_refused_while_another_process_holds_it(tmp_path, holder):
    message = rf"{tmp_path} is in use by another process \(pid {holder.pid}\)\.$"
    with pytest.raises(UserError, match=message), locked(tmp_path):
        pass


def test_a_lock_can_be_waited_for(tmp_path, holder, capsys):
    timer = threading.Timer(0.3, holder.stdin.close)
    timer.start()
    with locked(tmp_path, wait_for="does this."):
        assert holder.wait() == 0
    timer.join()
    expected = f"waiting for another process (pid {holder.pid}), which does this.\n"
    assert capsys.readouterr().out == expected


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    for _ in range(2):  # and with its context
        with locked(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    message = r"cannot be locked .*Function not implemented"
    with pytest.raises(UserError, match=message), locked(tmp_path):
        pass
