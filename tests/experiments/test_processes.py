"""Runs on several devices and of several processes, which are real ones on loopback."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import cli, distributed
from experiments.data import DataError, load
from experiments.data.schedule import Schedule
from experiments.finetune import FinetuneConfig, main
from experiments.runs import runner
from experiments.runs.config import RunConfig
from experiments.runs.devices import mesh_of
from fqt_jax import checkpoints
from fqt_jax.checkpoints import latest_checkpoint

ROOT = pathlib.Path(__file__).parents[2]
SLOW = pytest.mark.slow

pytestmark = pytest.mark.usefixtures("relaxed_promotion", "own_folder", "tiny_vgg")

OPTIONS = {
    "model": "vgg_small",
    "width": 0.25,
    "image_size": 8,
    "limit": 96,
    "batch_size": 32,
    "epochs": 3,
    "learning_rate": 1e-3,
    "recipe": "fqt1",
    "from_scratch": True,
}


def tiny(**changes) -> FinetuneConfig:
    return FinetuneConfig(**{**OPTIONS, "out": pathlib.Path("run"), **changes})


def lines(folder) -> list[dict]:
    text = (pathlib.Path(folder) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def parameters(folder) -> dict[str, np.ndarray]:
    return checkpoints._read_arrays(latest_checkpoint(pathlib.Path(folder) / "checkpoints"))


def stopping_at(monkeypatch, step_to_stop_at):
    original = runner.build_train_step

    def build(*args, **kwargs):
        step = original(*args, **kwargs)

        def wrapped(state, *rest):
            result = step(state, *rest)
            if int(result[0].step) == step_to_stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            return result

        return wrapped

    monkeypatch.setattr(runner, "build_train_step", build)


def test_a_run_moves_from_eight_devices_to_two_and_is_that_of_one(monkeypatch):
    options = {"recipe": "qat", "dataset": "digits"}
    main(tiny(**options, out=pathlib.Path("one")))
    with monkeypatch.context() as patch:
        stopping_at(patch, 4)
        with pytest.raises(cli.Interrupted, match="stopped after step 4 of 9"):
            main(tiny(**options, devices=8))
    main(FinetuneConfig(resume=pathlib.Path("run"), devices=2))
    assert json.loads(pathlib.Path("run/config.json").read_text())["devices"] == 8
    for got, expected in zip(lines("run"), lines("one"), strict=True):
        assert got == pytest.approx(expected, rel=1e-3)
    for name, value in parameters("one").items():
        np.testing.assert_allclose(parameters("run")[name], value, rtol=1e-3, atol=1e-4)


def test_what_signs_leave_out_is_saved_and_moves_with_the_run(monkeypatch):
    options = {"recipe": "qat", "reduce": "signs", "reduce_warmup": 0.2, "devices": 4}
    main(tiny(**options, out=pathlib.Path("whole")))
    for devices, out in ((4, "same"), (2, "fewer")):
        with monkeypatch.context() as patch:
            stopping_at(patch, 4)
            with pytest.raises(cli.Interrupted):
                main(tiny(**options, out=pathlib.Path(out)))
        main(FinetuneConfig(resume=pathlib.Path(out), devices=devices))
    assert lines("same") == lines("whole")
    for name, value in parameters("whole").items():
        np.testing.assert_array_equal(parameters("same")[name], value)
    assert parameters("fewer")["exchange.error"].shape[0] == 2
    assert np.abs(parameters("whole")["exchange.error"]).max() > 0


@pytest.mark.parametrize("stream", ["no", "yes"])
def test_one_draw_from_the_batch_and_streams_run_on_devices(stream):
    options = {"epochs": 1, "stream": stream, "devices": "all", "one_draw": True}
    main(tiny(**options, draw_from="batch", out=pathlib.Path("a")))
    assert lines("a")[0]["epoch"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 9}, r"devices is 9, but there are only 8\. The .* JAX_NUM_CPU_DEVICES=N"),
        ({"devices": 5}, "batch_size must be a multiple of 5, the number of devices, .* got 32"),
        ({"batch_statistics": "local"}, "batch_statistics has no effect on one device"),
        ({"one_draw": True, "draw_from": "batch"}, "draw_from has no effect on one device"),
    ],
)
def test_devices_that_do_not_fit_are_named(options, message):
    with pytest.raises(cli.UserError, match=message):
        mesh_of(tiny(**options))
    with pytest.raises(cli.UserError, match=message):
        main(tiny(**options))
    assert not pathlib.Path("run").exists()


def test_options_about_devices_that_contradict_each_other_are_named():
    with pytest.raises(cli.UserError, match="devices must be at least 1, or all; got 0"):
        tiny(devices=0)
    with pytest.raises(cli.UserError, match="draw_from has no effect without one-draw"):
        tiny(draw_from="batch")
    with pytest.raises(cli.UserError, match="reduce signs is of the optimizer adam; got sgd"):
        tiny(reduce="signs", optimizer="sgd")
    with pytest.raises(cli.UserError, match="reduce signs and clip_norm cannot be combined"):
        tiny(reduce="signs", clip_norm=1.0)
    with pytest.raises(cli.UserError, match="reduce_warmup has no effect: reduce is not signs"):
        tiny(reduce_warmup=0.5)
    with pytest.raises(cli.UserError, match=r"reduce_warmup must be in \(0, 1\); got 1"):
        tiny(reduce="signs", reduce_warmup=1.0)
    with pytest.raises(cli.UserError, match="draw_from batch needs synchronized batch-statistics"):
        tiny(one_draw=True, draw_from="batch", batch_statistics="local")


def test_who_runs_it_is_no_part_of_a_run():
    config = tiny(coordinator="localhost:1", processes=2, process=1)
    assert "coordinator" not in config.to_json()
    assert RunConfig.OF_THE_CALL[2:] == ("coordinator", "processes", "process")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--process", "1"], "several processes need .* got None, None and 1"),
        (["--coordinator", "a:1", "--processes", "2", "--process", "2"], "I from 0 to N - 1"),
        (["--coordinator", "a", "--processes=2", "--process=0"], "must be HOST:PORT; got a"),
        (["--coordinator", "a:1", "--processes", "x", "--process", "0"], "need .* got a:1, x"),
    ],
)
def test_processes_that_cannot_find_each_other_are_named(arguments, message):
    with pytest.raises(distributed.StartError, match=message):
        distributed.start(["--recipe", "fqt1", *arguments])


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


def test_a_cluster_is_known_by_its_variables(monkeypatch):
    for name in (*SLURM, "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert not distributed._in_cluster()
    for found, several in [
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False),  # not started by srun
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ]:
        with monkeypatch.context() as patch:
            for name, value in found.items():
                patch.setenv(name, value)
            assert distributed._in_cluster() == several, found
            distributed.start(["--processes", "1"])  # one wherever it runs
    assert distributed.first()
    assert not distributed.several()


def test_shares_of_a_stream_are_its_batches():
    data = load("digits", limit=100, stream="yes")
    parts = (data.train, data.validation, data.test)
    whole = Schedule(*parts, batch_size=32, epochs=1)
    shares = [Schedule(*parts, batch_size=32, epochs=1, share=i, shares=4) for i in range(4)]
    for index in range(len(whole)):
        made = [share[index] for share in shares]
        for name, array in whole[index].items():
            np.testing.assert_array_equal(np.concatenate([m[name] for m in made]), array)
    with pytest.raises(DataError, match="a batch of 32 images has no 5 equal pieces"):
        Schedule(*parts, batch_size=32, epochs=1, shares=5)


class Job:
    """Processes of one run."""

    def __init__(self, count, *arguments, devices=1, environment=None, out="run"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for number in range(count):
            joined = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count)]
            joined += ["--process", str(number)]
            if environment is not None:
                joined = []
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "experiments.finetune", *joined, *arguments],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={
                        **os.environ,
                        "PYTHONPATH": str(ROOT),
                        "JAX_NUM_CPU_DEVICES": str(devices),
                        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
                        **(environment(number) if environment else {}),
                    },
                )
            )

    def ended(self, seconds=280):
        """Status, output and errors of each."""
        until, found = time.monotonic() + seconds, []
        for each in self.processes:
            out, err = each.communicate(timeout=max(1, until - time.monotonic()))
            # XLA tells what the compilation cache was made on.
            errors = [line for line in err.splitlines() if "cpu_aot" not in line]
            found.append((each.returncode, out, errors))
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for each in self.processes:
            with contextlib.suppress(ProcessLookupError):
                each.kill()
            each.communicate()


def arguments(**changes) -> list[str]:
    options = {**OPTIONS, "out": "run", **changes}
    found = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        found += [option] if value is True else [option, str(value)]
    return found


def wait_for_epochs(count, folder="run"):
    path, until = pathlib.Path(folder, "metrics.jsonl"), time.monotonic() + 240
    while not (path.exists() and len(path.read_text().splitlines()) >= count):
        assert time.monotonic() < until, "the run does not begin"
        time.sleep(0.05)


@SLOW
def test_two_and_four_processes_train_alike_and_the_first_one_writes():
    for count, devices in ((2, 2), (4, 1)):
        with Job(count, *arguments(out=f"run{count}"), devices=devices) as job:
            (status, out, errors), *others = job.ended()
        assert (status, errors) == (0, [])
        assert "epoch 3/3: loss" in out
        assert others == [(0, "", [])] * (count - 1)
    assert lines("run2") == lines("run4")  # there are four devices either way
    for name, value in parameters("run2").items():
        np.testing.assert_array_equal(parameters("run4")[name], value)
    assert {path.name for path in pathlib.Path("run2").iterdir()} == {
        ".lock",
        "checkpoints",
        "config.json",
        "curves.png",
        "layers.txt",
        "metrics.jsonl",
        "resolved.json",
        "summary.json",
    }


@SLOW
def test_each_process_writes_its_part_of_what_signs_leave_out():
    options = {"recipe": "qat", "reduce": "signs", "reduce_warmup": 0.2, "epochs": 6}
    with Job(2, *arguments(**options, out="whole"), devices=2) as job:
        assert [status for status, _, errors in job.ended() if not errors] == [0, 0]
    written = latest_checkpoint(pathlib.Path("whole/checkpoints"))
    assert set(checkpoints.read_arrays(written.absolute() / "shares")) == {
        "exchange.momentum",
        "exchange.error",
        "exchange.error_of_part",
    }
    assert parameters("whole")["exchange.error"].shape[0] == 4
    with Job(2, *arguments(**options), devices=2) as job:
        wait_for_epochs(2)
        job.processes[1].kill()
        job.ended(60)
    with Job(2, "--resume", "run", devices=2) as job:
        assert job.ended()[0][0] == 0
    assert lines("run") == lines("whole")
    for name, value in parameters("whole").items():
        np.testing.assert_array_equal(parameters("run")[name], value, err_msg=name)
    # One process has other numbers of devices to share out, and reads what two have written.
    main(FinetuneConfig(resume=pathlib.Path("run"), devices=2))


@SLOW
def test_processes_pretrain_together_once():
    options = arguments(epochs=1, pretrain_epochs=1, cache="cache")
    options.remove("--from-scratch")
    for out, told in (("first", "pretraining on mnist5k once"), ("second", "starting from the")):
        with Job(2, *options, "--out", out, devices=2) as job:
            (status, said, errors), other = job.ended()
        assert (status, errors, other) == (0, [], (0, "", []))
        assert told in said
    assert "pretraining" not in said
    (folder,) = pathlib.Path("cache").iterdir()
    assert json.loads((folder / "config.json").read_text())["devices"] == 4
    assert lines("first") == lines("second")


@SLOW
def test_processes_find_each_other_under_slurm():
    job_id = str(os.getpid())  # the port follows from it
    with Job(
        2,
        *arguments(epochs=1, stream="yes"),
        environment=lambda number: SLURM | {"SLURM_JOB_ID": job_id, "SLURM_PROCID": str(number)},
    ) as job:
        (status, out, errors), other = job.ended()
    assert (status, errors, other) == (0, [], (0, "", []))
    assert "test accuracy" in out


@SLOW
@pytest.mark.parametrize(("count", "killed"), [(2, 0), (2, 1), (4, 1)])
def test_one_killed_ends_the_others_in_one_line_and_the_run_goes_on_bit_for_bit(count, killed):
    with Job(count, *arguments(epochs=8, out="whole")) as job:
        assert job.ended()[0][0] == 0
    with Job(count, *arguments(epochs=8)) as job:
        wait_for_epochs(2)
        job.processes[killed].kill()
        ended = job.ended(60)
    for number, (status, _, errors) in enumerate(ended):
        if number == killed:
            assert status == -signal.SIGKILL
        else:
            assert status != 0
            assert len(errors) == 1, errors
            assert re.fullmatch(
                "error: lost another process of the run, or the connection to it; continue by: "
                "python -m experiments.finetune --resume run",
                errors[0],
            )
    assert len(lines("run")) < 8
    with Job(count, "--resume", "run") as job:
        assert job.ended()[0][0] == 0
    assert lines("run") == lines("whole")
    for name, value in parameters("whole").items():
        np.testing.assert_array_equal(parameters("run")[name], value, err_msg=name)


@SLOW
@pytest.mark.parametrize("asked", [0, 1])
def test_asking_one_process_to_stop_stops_all_after_the_same_step(asked):
    with Job(2, *arguments(epochs=200)) as job:
        wait_for_epochs(2)
        job.processes[asked].send_signal(signal.SIGTERM)
        first, second = job.ended(60)
    assert first[0] in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert second[2] == []
    (line,) = first[2]
    assert re.fullmatch(
        r"stopped after step \d+ of 600 and saved; continue by: .*--resume run", line
    )


@SLOW
def test_what_the_first_process_refuses_ends_all():
    pathlib.Path("run").mkdir()
    pathlib.Path("run/mine.txt").write_text("")
    with Job(2, *arguments()) as job:
        first, second = job.ended(120)
    assert first[0] == 2
    assert first[2] == ["error: the folder run exists already: choose another one."]
    assert second[0] != 0
    assert len(second[2]) == 1
