"""Kills training runs at random moments, resumes them, and compares them with an unbroken one.

    python -m tests.experiments.kills --kills 50
    python -m tests.experiments.kills --kills 50 --stream   # images decoded by two processes

A short fine-tuning from scratch runs once to its end. Then the same run is started, killed by
SIGKILL, SIGTERM or SIGINT after a random time, resumed, killed again, until it is complete, and
begins anew in another folder, until as many kills are done as were asked for. Each complete run
must have the final state, the metrics and the results of the unbroken one, bit for bit, and each
signal that can be caught must end the process with its status, in one line.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import tyro
from flax import nnx

from experiments.finetune import FinetuneConfig
from experiments.runs import tasks
from experiments.runs.kinds import Images
from experiments.runs.saved_config import read_config
from fqt_jax.checkpoints import latest_checkpoint, read_metadata, restore_checkpoint
from fqt_jax.training import TrainState, create_state

ROOT = pathlib.Path(__file__).parents[2]

Options = dict[str, object]
OPTIONS: Options = {
    "dataset": "digits",
    "model": "vgg_small",
    "width": 0.25,
    "recipe": "fqt1",
    "learning-rate": 1e-3,
    "batch-size": 32,
    "limit": 200,
    "epochs": 20,
}
STREAMED: Options = {**OPTIONS, "stream": "yes", "workers": 2}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def check(folder: pathlib.Path, kills: int, seed: int, options: Options = OPTIONS) -> None:
    """Compares runs that are killed with an unbroken one.

    Args:
      folder: for the runs; it exists and is empty.
      kills: how many.
      seed: of their moments and signals.
      options: of the runs.

    Raises:
      AssertionError: a run differs, or ended as it should not.
    """
    draw = random.Random(seed)
    whole = folder / "whole"
    _finish(_start(folder, whole, options))  # fills the cache of compiled programs, too
    began = time.perf_counter()
    _finish(_start(folder, folder / "again", options))
    seconds = time.perf_counter() - began
    compare(folder / "again", whole)
    print(f"the unbroken run takes {seconds:.1f} s", flush=True)
    done, runs = 0, 0
    while done < kills:
        runs += 1
        run = folder / f"run-{runs}"
        while done < kills and not (run / "summary.json").exists():
            number = draw.choice(SIGNALS)
            # Up to the whole time: a resumed run may come to its end before.
            done += _kill(_start(folder, run, options), number, draw.uniform(0, seconds), done + 1)
        if not (run / "summary.json").exists():
            _finish(_start(folder, run, options))
        compare(run, whole)
        print(f"{run.name} is complete, and the unbroken run bit for bit", flush=True)


def _start(folder: pathlib.Path, run: pathlib.Path, options: Options) -> subprocess.Popen[str]:
    """Starts a run, or resumes it where a user could."""
    given = [f"--{name}={value}" for name, value in options.items()]
    fresh = ["--from-scratch", *given, f"--out={run}"]
    started = (run / "config.json").exists()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA compares machines in long lines when it reads the cache
    }
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.finetune"]
        + ([f"--resume={run}"] if started else fresh),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
    )


def _finish(process: subprocess.Popen[str]) -> None:
    _, error = process.communicate()
    assert (process.returncode, error) == (0, ""), f"status {process.returncode}: {error}"


def _kill(process: subprocess.Popen[str], number: signal.Signals, delay: float, count: int) -> bool:
    """Kills a process after a while; whether that came before its end."""
    wait_for_handlers(process)
    with process:
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        out, error = process.communicate()
    status = process.returncode
    what = f"kill {count}, {number.name} after {delay:.2f} s"
    line = (error.splitlines() or out.splitlines() or ["nothing printed"])[-1]
    print(f"{what}: status {status}: {line}", flush=True)
    if status == 0:
        assert error == "", f"{what}: {error}"
        return False
    if number == signal.SIGKILL:
        assert (status, error) == (-number, ""), f"{what}: status {status}: {error}"
    else:
        assert status == 128 + number, f"{what}: status {status}: {error}"
        assert error.count("\n") == 1, f"{what}: {error}"
    return True


def wait_for_handlers(process: subprocess.Popen[str]) -> None:
    """Waits until a process catches SIGTERM: before that, Python itself is starting."""
    status = pathlib.Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = (line.split() for line in status.read_text().splitlines())
        caught = next(int(words[1], 16) for words in lines if words[0] == "SigCgt:")
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)


def compare(run: pathlib.Path, whole: pathlib.Path) -> None:
    """Compares what two complete runs left behind.

    Raises:
      AssertionError: they differ.
    """
    for name in ("config.json", "metrics.jsonl", "layers.txt"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), f"{run / name} differs"
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, whole)]
    for summary in summaries:
        del summary["seconds"], summary["step_ms"], summary["wait_fraction"]
    assert summaries[0] == summaries[1], f"{run / 'summary.json'} differs"
    found, expected = (latest_checkpoint(folder / "checkpoints") for folder in (run, whole))
    assert found is not None, f"{run} has no checkpoint"
    assert expected is not None, f"{whole} has no checkpoint"
    assert found.name == expected.name
    assert read_metadata(found) == read_metadata(expected), f"the metadata of {found} differ"
    template = _template(run)
    states = [restore_checkpoint(path, template) for path in (found, expected)]
    named = [jax.tree_util.tree_leaves_with_path(state) for state in states]
    for (path, a), (_, b) in zip(*named, strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        same = np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert same, f"{found}: {jax.tree_util.keystr(path)} differs"


def _template(run: pathlib.Path) -> TrainState:
    config = read_config(FinetuneConfig(), run)
    model = tasks.build_task(config, tasks.load_dataset(config), None).model
    optimizer = config.build_optimizer().build(nnx.state(model, nnx.Param), total_steps=1)
    return create_state(model, optimizer, Images.metrics)[1]


def main(kills: int = 50, seed: int = 0, stream: bool = False) -> None:
    """Kills training runs at random moments, resumes and compares them.

    Args:
      kills: how many.
      seed: of their moments and signals.
      stream: whether the images are streamed.
    """
    with tempfile.TemporaryDirectory() as folder:
        check(pathlib.Path(folder), kills, seed, STREAMED if stream else OPTIONS)


if __name__ == "__main__":
    tyro.cli(main)
