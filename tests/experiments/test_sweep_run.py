"""Sweeps as they run: a worker in this process, and processes that stand in for workers."""

import io
import itertools
import json
import os
import pathlib
import signal
import sys
import threading
import time

import pytest

from experiments import finetune, process
from experiments.ablate import STUDIES, AblateConfig
from experiments.ablate import main as ablate
from experiments.cli import UserError
from experiments.finetune import FinetuneConfig
from experiments.runs import locks, runner
from experiments.sweeps import run as sweep_run
from experiments.sweeps import worker as sweep_worker
from experiments.sweeps.run import run_groups
from experiments.sweeps.specs import parse
from experiments.sweeps.sweep import Group, Store, collect
from experiments.tables import TablesConfig
from experiments.tables import main as tables

STAND_IN = """
import json, os, pathlib, signal, sys, time
request = json.loads(pathlib.Path(sys.argv[1]).read_text())
script = json.loads(pathlib.Path("script.json").read_text())
for name, action in script[json.dumps(request["group"]["base"], sort_keys=True)]:
    folder = pathlib.Path(request["root"], "cells", name)
    if name in request["skip"] or (folder / "summary.json").exists():
        continue
    print(json.dumps({"begin": name}), flush=True)
    if action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "wait":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
        pathlib.Path("waiting").touch()
        time.sleep(60)
    summary = {"seed": 0, "learning_rate": 0.1, "validation_accuracy": 0.5, "seconds": 1.0}
    summary |= {"validation_loss": 1.0, "test_accuracy": action, "gradient_bits": 1, "step_ms": 2}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    line = {"epoch": 1, "train_loss": 1.0, "validation_accuracy": 0.5}
    (folder / "metrics.jsonl").write_text(json.dumps(line))
    print(json.dumps({"end": name, "summary": summary}), flush=True)
"""


pytestmark = pytest.mark.usefixtures("relaxed_promotion", "own_folder", "tiny_vgg")


@pytest.fixture
def act(tmp_path, monkeypatch):
    """Makes workers do as they are told, cell by cell: an accuracy, "die" or "wait"."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(sweep_run, "_WORKER", (sys.executable, str(tmp_path / "stand_in.py")))

    script: dict[str, list] = {}

    def add(group: Group, *actions) -> None:
        cells = [group.cell(seed).name for seed in group.seeds]
        key = json.dumps(group.base.to_json(), sort_keys=True)
        script[key] = list(zip(cells, actions, strict=True))
        (tmp_path / "script.json").write_text(json.dumps(script))

    return add


def group(**options) -> Group:
    return Group({"recipe": "fqt1"}, FinetuneConfig(**options), (0, 1, 2))


def test_a_cell_that_takes_its_process_down_leaves_the_others_running(act, capsys):
    act(group(), 0.5, "die", 0.75)
    (result,) = run_groups([group()], pathlib.Path("out"), 1)
    assert result.values("test_accuracy") == [0.5, 0.75]
    (error,) = result.failures.values()
    assert error.startswith("its process ended by signal 9: out of memory? (see out/logs/")
    assert "1/1   failed: its process ended by signal 9" in capsys.readouterr().out
    act(group(), "die", 0.625, "die")  # what is done is not run again
    (result,) = run_groups([group()], pathlib.Path("out"), 1)
    assert result.values("test_accuracy") == [0.5, 0.625, 0.75]
    run_groups([group()], pathlib.Path("out"), 1)
    assert "complete already" in capsys.readouterr().out


def test_a_worker_that_does_not_start_fails_its_group_alone(act, monkeypatch, tmp_path):
    (tmp_path / "stand_in.py").write_text("raise SystemExit(3)")
    (result,) = run_groups([group()], pathlib.Path("out"), 1)
    assert result.summaries == {}
    assert len(result.failures) == 3
    assert all("ended with 3" in error for error in result.failures.values())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_sweep_stops_its_workers_and_goes_on_later(number, status, act):
    act(group(), 0.5, "wait", 0.75)

    def interrupt() -> None:
        while not pathlib.Path("waiting").exists():
            event.wait(0.05)
        os.kill(os.getpid(), number)

    event = threading.Event()
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(process.Interrupted, match="the same command continues the sweep in out"):
        run_groups([group()], pathlib.Path("out"), 2)
    assert process.status_of_stop() == status
    thread.join()
    result = collect(group(), Store(pathlib.Path("out")))
    assert result.values("test_accuracy") == [0.5]
    assert set(result.failures.values()) == {"did not run"}
    act(group(), 0.5, 0.625, 0.75)
    (result,) = run_groups([group()], pathlib.Path("out"), 2)
    assert result.values("test_accuracy") == [0.5, 0.625, 0.75]


def test_a_sweep_that_is_running_is_not_run_again(act):
    act(group(), 0.5, 0.5, 0.5)
    pathlib.Path("out").mkdir()
    message = "out is in use by another process"
    with locks.locked(pathlib.Path("out")), pytest.raises(UserError, match=message):
        run_groups([group()], pathlib.Path("out"), 1)
    assert not pathlib.Path("out/cells").exists()


def test_an_error_of_one_group_stops_the_others(act, monkeypatch):
    act(group(), "wait", 0.5, 0.5)
    other = group(epochs=2)
    run = sweep_run._Sweep.run

    def failing(self, group):
        if group == other:
            while not pathlib.Path("waiting").exists():
                time.sleep(0.01)
            raise OSError("no space")
        run(self, group)

    monkeypatch.setattr(sweep_run._Sweep, "run", failing)
    with pytest.raises(OSError, match="no space"):
        run_groups([group(), other], pathlib.Path("out"), 2)


def test_an_ablation_draws_each_study_and_names_what_no_run_finished(act, capsys):
    config = AblateConfig(studies=("clip", "controls"), seeds=(0, 1, 2))
    specs = [parse("recipe", text) for name in config.studies for text in STUDIES[name]]
    point = {
        "dataset": parse("dataset", config.task),
        "model": parse("model", config.models[0]),
        "optimizer": parse("optimizer", config.optimizer),
    }
    for spec in specs:
        result = ("die", "die", "die") if spec.label == "psq1" else (0.5, 0.75, 1.0)
        act(config.group({**point, "recipe": spec}), *result)
    with pytest.raises(SystemExit):  # a run failed
        ablate(config)
    assert pathlib.Path("runs/ablate/errors-1-vgg_small.png").read_bytes().startswith(b"\x89PNG")
    table = pathlib.Path("runs/ablate/tables.md").read_text()
    assert "| clip | fqt1:clip=false | 75.0 ± 25.0 | 1 | 2 |" in table
    assert "|  | psq1 | - | - | - |" in table


def test_equal_groups_run_once_whatever_they_are_called(act, capsys):
    act(group(), 0.5, 0.5, 0.5)
    other = Group({"recipe": "another name"}, group().base, group().seeds)
    results = run_groups([group(), other], pathlib.Path("out"), 1)
    assert [len(result.summaries) for result in results] == [3, 3]
    assert "2/2" not in capsys.readouterr().out


def tiny(**changes) -> FinetuneConfig:
    options = {
        "model": "vgg_small",
        "width": 0.125,
        "image_size": 8,
        "limit": 64,
        "batch_size": 32,
        "epochs": 1,
        "learning_rate": 1e-2,
        "from_scratch": True,
        "recipe": "qat",
    }
    return FinetuneConfig(**{**options, **changes})


@pytest.mark.slow
def test_a_worker_compiles_once_and_its_runs_are_those_of_their_own(monkeypatch):
    steps = []
    original = runner.build_train_step

    def recording(*args, **kwargs):
        steps.append(original(*args, **kwargs))
        return steps[-1]

    monkeypatch.setattr(runner, "build_train_step", recording)
    cells = Group({}, tiny(), (0, 1), (1e-3, 1e-2, 1e-1))
    reports = io.StringIO()
    sweep_worker.main({"group": cells.to_json(), "root": "out", "skip": []}, reports)
    assert [step.jitted._cache_size() for step in steps] == [1]
    result = collect(cells, Store(pathlib.Path("out")))
    assert result.failures == {}
    assert len(reports.getvalue().splitlines()) == 2 * (len(result.tried) + 1)
    assert not list(pathlib.Path("out").glob("cells/*/checkpoints"))

    alone = tiny(seed=1, learning_rate=result.rate, out=pathlib.Path("alone"))
    finetune.main(alone)
    summary = json.loads(pathlib.Path("alone/summary.json").read_text())
    timed = {"seconds": 0, "step_ms": 0, "wait_fraction": 0}
    assert {**result.summaries[1], **timed} == {**summary, **timed}


def test_a_worker_reports_a_failure_and_goes_on():
    cells = Group({}, tiny(batch_size=10_000, limit=None), (0, 1))
    reports = io.StringIO()
    sweep_worker.main({"group": cells.to_json(), "root": "out", "skip": []}, reports)
    failures = collect(cells, Store(pathlib.Path("out"))).failures
    assert len(failures) == 2
    assert all("batch_size is 10000, but digits has only" in text for text in failures.values())
    ends = [json.loads(line) for line in reports.getvalue().splitlines()][1::2]
    assert [end["diverged"] for end in ends] == [False, False]


def test_the_main_table_has_its_closing_rows_and_reports_what_failed(act, capsys):
    config = TablesConfig(
        datasets=("a=digits", "b=digits:epochs=3"),
        models=("vgg_small",),
        recipes=("psq1", "fqt1", "qat"),
        seeds=(0,),
        out=pathlib.Path("out"),
    )
    accuracies = {"a": (0.5, 0.75, 0.8125), "b": (0.25, 0.375, "die")}
    for dataset, options in (("a", {}), ("b", {"epochs": 3})):
        for recipe, value in zip(config.recipes, accuracies[dataset], strict=True):
            base = FinetuneConfig(model="vgg_small", recipe=recipe, pretrain_seed=0, **options)
            act(Group({}, base, (0,)), value)
    with pytest.raises(SystemExit) as stop:
        tables(config)
    assert stop.value.code == 1
    text = pathlib.Path("out/tables.md").read_text()
    assert "| a | vgg_small | 50.0 | 75.0 | 81.2 |" in text
    assert "| b | vgg_small | 25.0 | 37.5 | - |" in text
    assert "| mean |  | 50.0 | 75.0 | 81.2 |" in text
    assert "| gain over psq1 |  |  | 25.0 | 31.2 |" in text
    assert "| loss to qat |  | 31.2 | 6.2 |  |" in text
    assert "leave out what not every recipe finished" in text
    report = json.loads(pathlib.Path("out/results.json").read_text())
    assert len(report["groups"]) == 6
    assert "failed: digits-vgg_small-qat" in capsys.readouterr().err


def test_the_main_table_tells_text_in_bits():
    config = TablesConfig(
        preset="sequences",
        datasets=("t=pydoc:from_scratch", "a=digits"),
        models=("gpt_small", "lstm"),
        recipes=("psq1", "qat"),
        seeds=(0, 1),
        out=pathlib.Path("out"),
    )
    tasks = {
        "gpt_small": {"dataset": "pydoc", "from_scratch": True},
        "lstm": {"dataset": "digits"},
    }
    for (model, options), recipe in itertools.product(tasks.items(), config.recipes):
        base = FinetuneConfig(model=model, recipe=recipe, pretrain_seed=0, **options)
        for seed in config.seeds:
            folder = pathlib.Path("out/cells", Group({}, base, (0, 1)).cell(seed).name)
            folder.mkdir(parents=True)
            summary = {"validation_accuracy": 0.5, "validation_loss": 1.0, "gradient_bits": 1}
            summary |= {"test_accuracy": 0.5 + 0.25 * (recipe == "qat"), "step_ms": 2}
            if model == "gpt_small":
                summary["test_bits"] = 4.5 - (recipe == "qat") + seed / 8
            (folder / "summary.json").write_text(json.dumps(summary))
            (folder / "metrics.jsonl").write_text("")
    tables(config)
    text = pathlib.Path("out/tables.md").read_text()
    assert "| t, bits | gpt_small | 4.562 ± 0.088 | 3.562 ± 0.088 |" in text
    assert "| a | lstm | 50.0 ± 0.0 | 75.0 ± 0.0 |" in text
    assert "| mean, bits per character |  | 4.562 | 3.562 |" in text
    assert "| gain over psq1, bits |  |  | 1.000 ± 0.000 |" in text
    assert "| loss to qat, bits |  | 1.000 ± 0.000 |  |" in text
    assert "| loss to qat, points |  | 25.0 ± 0.0 |  |" in text
    assert "| gpt_small | " not in text.replace("| t, bits | gpt_small | ", "")


def test_the_main_table_at_tuned_rates(capsys):
    config = TablesConfig(
        datasets=("a=digits:learning_rate=2e-3",),
        models=("vgg_small",),
        recipes=("fqt1", "qat"),
        seeds=(0, 1),
        tune=(0.5, 1),
        tuning_seeds=2,
        out=pathlib.Path("out"),
    )
    # What each recipe's rates come to: the best lies on the edge first, then between others.
    validation = {
        "fqt1": {1e-3: 0.7, 2e-3: 0.8, 4e-3: 0.75},
        "qat": {5e-4: 0.8, 1e-3: 0.9, 2e-3: 0.8},
    }
    for recipe, rates in validation.items():
        base = FinetuneConfig(model="vgg_small", recipe=recipe, pretrain_seed=0)
        for (rate, value), seed in itertools.product(rates.items(), config.seeds):
            folder = pathlib.Path("out/cells", Group({}, base, (0, 1)).cell(seed, rate).name)
            folder.mkdir(parents=True)
            summary = {"validation_accuracy": value, "validation_loss": 1.0, "seed": seed}
            summary |= {"test_accuracy": value + seed / 100, "gradient_bits": 1, "step_ms": 2}
            (folder / "summary.json").write_text(json.dumps(summary))
            (folder / "metrics.jsonl").write_text("")
    tables(config)
    text = pathlib.Path("out/tables.md").read_text()
    assert "| a | vgg_small | 80.5 ± 0.7 at 0.002 | 90.5 ± 0.7 at 0.001 |" in text
    assert "| loss to qat |  | 10.0 ± 0.0 |  |" in text
    assert "at the rate of the best validation accuracy, over 2 seeds" in text
    assert "complete already" in capsys.readouterr().out
