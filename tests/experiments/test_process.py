"""How processes end. The scripts stand in for experiments and import nothing heavy."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.experiments.kills import wait_for_handlers

ROOT = pathlib.Path(__file__).parents[2]

# Runs for minutes in C, as a compilation does, and lets other threads run meanwhile.
STUCK = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"

START = """
import hashlib, os, signal, sys, time
from experiments import process
process.install()
"""


def start(script: str, **options) -> subprocess.Popen[str]:
    """Starts a script and waits until it says that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", START + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, error


@pytest.mark.parametrize("work", [STUCK, "time.sleep(600)", "while True: pass"])
@pytest.mark.parametrize(
    ("number", "end"),
    [(signal.SIGINT, (130, "interrupted")), (signal.SIGTERM, (143, "terminated"))],
)
def test_a_signal_ends_a_process_at_once_in_one_line(work, number, end):
    process = start(f"print('ready')\n{work}")
    time.sleep(0.1)
    process.send_signal(number)
    status, word = end
    assert ended(process) == (status, "", f"{word}.\n")


def test_the_line_says_how_to_go_on_and_children_end_too(tmp_path):
    process = start(
        f"""
process.if_stopped("do that.")
with process.on_stop(lambda: open({str(tmp_path / "done")!r}, "w")):
    print("ready")
    {STUCK}
"""
    )
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "", "terminated; do that.\n")
    assert (tmp_path / "done").exists()


DEFERRING = """
with process.StopOnSignal() as stop:
    stop.defer()
    stop.defer()
    print("ready")
    while not stop.requested:
        time.sleep(0.01)
    print("saving")
    {saving}
    try:
        raise process.Interrupted("saved.")
    except process.Interrupted as end:
        process.stopped(end)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_has_something_to_save_stops_when_it_has_saved(number, status):
    process = start(DEFERRING.format(saving="time.sleep(0.3)"))
    process.send_signal(number)
    assert ended(process) == (status, "saving\n", "saved.\n")


@pytest.mark.parametrize("saving", [STUCK, "time.sleep(600)"])
def test_a_second_signal_does_not_wait(saving):
    process = start(DEFERRING.format(saving=saving))
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "saving\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", "interrupted.\n")


def test_two_signals_end_a_step_that_does_not_return():
    process = start(f"stop = process.StopOnSignal()\nstop.defer()\nprint('ready')\n{STUCK}")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", "interrupted.\n")


def test_afterwards_signals_end_the_process_at_once_again():
    process = start(
        "with process.StopOnSignal() as stop:\n    stop.defer()\nprint('ready')\ntime.sleep(600)"
    )
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", "interrupted.\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_when_all_is_written_changes_nothing(number):
    """Python has set signals back to their default when its last thread is joined."""
    process = start(
        """
import atexit, threading
atexit.register(time.sleep, 0.5)
threading.Thread(target=time.sleep, args=(0.5,)).start()
process.settle()
print("ready")
"""
    )
    for _ in range(20):
        process.send_signal(number)
        time.sleep(0.03)
    assert ended(process) == (0, "", "")


def test_a_worker_ends_with_its_parent():
    process = start(f"process.end_with_parent()\nprint('ready')\n{STUCK}", stdin=subprocess.PIPE)
    assert process.poll() is None
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    assert ended(process) == (143, "", "terminated.\n")


def test_a_worker_that_is_saving_saves_when_its_parent_ends():
    process = start(
        "process.end_with_parent()" + DEFERRING.format(saving="time.sleep(1)"),
        stdin=subprocess.PIPE,
    )
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "saving\n"
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    assert ended(process) == (143, "", "saved.\n")


MAIN = """
import dataclasses
from experiments import cli

@dataclasses.dataclass(frozen=True)
class Config:
    pass

def main(config):
    print("ready")
    raise {error}

cli.run(main, Config)
"""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        ("cli.UserError('wrong\\n  option')", 2, "error: wrong option"),
        ("OSError(28, 'No space left', 'runs/x')", 2, "error: runs/x: No space left"),
        ("MemoryError", 1, "error: out of memory (FQT_JAX_TRACEBACK=1 shows where)"),
        (
            "RuntimeError('no device\\nframes')",
            1,
            "error: no device (FQT_JAX_TRACEBACK=1 shows where)",
        ),
        ("cli.Interrupted('saved.')", 130, "saved."),
    ],
)
def test_errors_of_an_experiment_are_one_line_and_a_status(error, status, line):
    assert ended(start(MAIN.format(error=error))) == (status, "", f"{line}\n")


def experiment(*arguments: str, cwd: pathlib.Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.finetune", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
    )


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("raise ValueError('JAX_WRONG must be\\n  a number.')", 2, "JAX_WRONG must be a number."),
        ("import no_such_package", 2, "No module named 'no_such_package'"),
    ],
)
def test_an_import_that_fails_gives_one_line_and_a_status(code, status, message, tmp_path):
    (tmp_path / "jax.py").write_text(code)
    assert ended(experiment(cwd=tmp_path)) == (status, "", f"error: {message}\n")
    result = ended(experiment(cwd=tmp_path, FQT_JAX_TRACEBACK="1"))
    assert "Traceback" in result[2]


@pytest.mark.parametrize(
    ("number", "end"),
    [(signal.SIGINT, (130, "interrupted")), (signal.SIGTERM, (143, "terminated"))],
)
def test_an_experiment_can_be_stopped_while_it_imports_jax(number, end, tmp_path):
    (tmp_path / "jax.py").write_text(f"import hashlib\nprint('here', flush=True)\n{STUCK}\n")
    process = experiment(cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    status, word = end
    assert ended(process) == (status, "", f"{word}.\n")


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("delay", "number", "status"),
    [
        (0, signal.SIGINT, 130),
        (0, signal.SIGTERM, 143),
        (0.1, signal.SIGINT, 130),
        (0.4, signal.SIGTERM, 143),
        (0.8, signal.SIGINT, 130),
        (1.6, signal.SIGTERM, 143),
        (3, signal.SIGINT, 130),
        (5, signal.SIGINT, 130),
    ],
)
def test_an_experiment_can_be_stopped_at_any_time(delay, number, status, tmp_path):
    process = experiment("--from-scratch", "--out", "run", cwd=tmp_path)
    wait_for_handlers(process)
    time.sleep(delay)
    process.send_signal(number)
    found, _, error = ended(process)
    assert found == status
    assert error.count("\n") == 1
    if (tmp_path / "run").exists():
        assert "--resume run" in error
    else:
        assert error in ("interrupted.\n", "terminated.\n")
