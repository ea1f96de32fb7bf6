import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import safetensors.numpy

import fqt_jax as fqt
from experiments import cli, process
from experiments import export as exporting
from experiments.data import load
from experiments.finetune import FinetuneConfig, main
from experiments.pretrain import PretrainConfig
from experiments.pretrain import main as pretrain
from experiments.runs import folders, locks, runner, summaries
from experiments.runs.config import RunConfig
from experiments.runs.finetuning import pretraining
from experiments.runs.pretraining import newest_pretraining
from experiments.runs.saved_config import config_from_json, read_config
from experiments.runs.tasks import build_task, load_dataset
from fqt_jax import export
from fqt_jax.checkpoints import (
    CheckpointError,
    latest_checkpoint,
    load_parameters,
    read_metadata,
)
from fqt_jax.models import MODELS, VGG

ROOT = pathlib.Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("relaxed_promotion", "own_folder", "tiny_vgg")


def tiny(**changes) -> FinetuneConfig:
    options = {
        "model": "vgg_small",
        "width": 0.25,
        "image_size": 8,
        "limit": 96,
        "batch_size": 32,
        "epochs": 3,
        "learning_rate": 1e-3,
        "from_scratch": True,
        "out": pathlib.Path("run"),
    }
    return FinetuneConfig(**{**options, **changes})


def lines(folder) -> list[dict]:
    text = (pathlib.Path(folder) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def parameters(folder) -> dict[str, np.ndarray]:
    from fqt_jax import checkpoints

    return checkpoints._read_arrays(latest_checkpoint(pathlib.Path(folder) / "checkpoints"))


def test_a_run_writes_its_folder(capsys):
    main(tiny())
    folder = pathlib.Path("run")
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.json",
        "curves.png",
        "layers.txt",
        "metrics.jsonl",
        "resolved.json",
        "summary.json",
    }
    assert [line["epoch"] for line in lines(folder)] == [1, 2, 3]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test_images"] == len(load("digits", image_size=8, limit=96).test)
    assert 0 <= summary["test_accuracy"] <= 1
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    best = max(lines(folder), key=lambda line: line["validation_accuracy"])["step"]
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {f"step_{step:08d}" for step in (6, 9, best)}
    resolved = {
        "image_size": 8,
        "flip": False,
        "pad": 0,
        "stem": "auto",
        "momentum": None,
        "stream": "no",
    }
    resolved |= {"learning_rate": 1e-3, "head_learning_rate": 1e-3}
    assert summary["resolved"] == resolved
    assert json.loads((folder / "resolved.json").read_text()) == resolved
    assert (summary["stopped"], summary["tested_epoch"]) == (None, 3)
    assert summary["checkpoint"] == "step_00000009"
    printed = capsys.readouterr().out
    assert "epoch 3/3: loss" in printed
    assert "test accuracy" in printed


# Within an epoch, at its end, at the end.
@pytest.mark.parametrize(
    "stop_at", [4, pytest.param(6, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)]
)
def test_a_stopped_run_resumes_with_the_numbers_of_an_unbroken_one(stop_at, monkeypatch, capsys):
    main(tiny(out=pathlib.Path("whole")))
    train_step = runner.build_train_step

    def interrupting(*args, **kwargs):
        step = train_step(*args, **kwargs)

        def wrapped(state, *rest):
            result = step(state, *rest)
            if int(result[0].step) == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            return result

        return wrapped

    monkeypatch.setattr(runner, "build_train_step", interrupting)
    with pytest.raises(
        process.Interrupted, match=rf"stopped after step {stop_at} of 9 .*--resume run"
    ):
        main(tiny())
    monkeypatch.setattr(runner, "build_train_step", train_step)
    assert read_metadata(latest_checkpoint("run/checkpoints"))["history"] == lines("run")
    main(FinetuneConfig(resume=pathlib.Path("run")))
    assert lines("run") == lines("whole")
    for name, value in parameters("whole").items():
        np.testing.assert_array_equal(parameters("run")[name], value, err_msg=name)
    run, whole = (json.loads(pathlib.Path(f, "summary.json").read_text()) for f in ("run", "whole"))
    timed = {"seconds": 0, "step_ms": 0, "wait_fraction": 0}
    assert {**run, **timed} == {**whole, **timed}
    main(FinetuneConfig(resume=pathlib.Path("run")))
    assert "complete already" in capsys.readouterr().out


def test_a_run_with_all_options_of_its_optimizer_is_saved_within_epochs(capsys):
    """It loses its last checkpoints, and goes on from within an epoch to the same numbers."""
    options = {
        "warmup_epochs": 1.0,
        "cosine_epochs": 1,
        "clip_norm": 0.5,
        "ema_decay": 0.9,
        "freeze": r"head\..*",
        "save_minutes": 1e-9,
    }
    main(tiny(out=pathlib.Path("whole"), **options))
    shutil.copytree("whole", "run")
    expected, folder = parameters("whole"), pathlib.Path("run/checkpoints")
    assert {path.name for path in folder.iterdir()} >= {"step_00000008", "step_00000009"}
    shutil.rmtree(folder / "step_00000009")
    for name in ("summary.json", "metrics.jsonl"):
        pathlib.Path("run", name).unlink()
    main(FinetuneConfig(resume=pathlib.Path("run")))
    assert "from step_00000008, after step 8 of 9" in capsys.readouterr().out
    assert lines("run") == lines("whole")
    for name, value in parameters("run").items():
        np.testing.assert_array_equal(expected[name], value, err_msg=name)
    # What is evaluated and handed on is the average; what is frozen is as it was.
    config = tiny()
    model = build_task(config, load_dataset(config), None).model
    head = model.head.kernel[...]
    load_parameters(folders.checkpoint_at(pathlib.Path("run")), model)
    averaged = {name: value for name, value in expected.items() if ".average." in name}
    assert len(averaged) == sum(name.startswith("params.") for name in expected)
    first = model.features.layers[0].kernel[...]
    np.testing.assert_array_equal(first, averaged["opt_state.average.features.layers.0.kernel"])
    assert not np.array_equal(first, expected["params.features.layers.0.kernel"])
    np.testing.assert_array_equal(model.head.kernel[...], head)


def test_a_run_without_patience_left_stops_and_tests_its_best_epoch(monkeypatch, capsys):
    validation, tested = iter([0.5, 0.7, 0.6, 0.7]), []

    def evaluated(step, state, batches):
        accuracy = next(validation, None)
        if accuracy is None:
            tested.append(int(state.step))
        return {"accuracy": accuracy or 0.25, "loss": 1.0}

    monkeypatch.setattr(runner, "evaluate", evaluated)
    main(tiny(patience=2, epochs=9))
    reason = "after epoch 4: no better validation accuracy than 70.0% of epoch 2 in 2 epochs"
    assert f"stopped early, {reason}" in capsys.readouterr().out
    path = pathlib.Path("run/summary.json")
    summary = json.loads(path.read_text())
    assert (summary["stopped"], summary["steps"], summary["epochs"]) == (reason, 12, 9)
    assert (summary["tested_epoch"], summary["validation_accuracy"]) == (2, 0.7)
    assert summary["test_accuracy"] == 0.25
    best = pathlib.Path("run/checkpoints", summary["checkpoint"])
    assert folders.checkpoint_at(pathlib.Path("run")) == best
    assert best.name == "step_00000006"
    assert len(list(best.parent.iterdir())) == 3
    path.unlink()
    main(FinetuneConfig(resume=pathlib.Path("run")))
    timed = {"seconds": 0, "step_ms": 0, "wait_fraction": 0}
    assert {**json.loads(path.read_text()), **timed} == {**summary, **timed}
    assert tested == [6, 6]


def test_the_step_compiles_once_over_epochs_and_resume(monkeypatch):
    steps = []
    original = runner.build_train_step

    def recording(*args, **kwargs):
        steps.append(original(*args, **kwargs))
        return steps[-1]

    monkeypatch.setattr(runner, "build_train_step", recording)
    main(tiny(epochs=2))
    (pathlib.Path("run") / "summary.json").unlink()
    main(FinetuneConfig(resume=pathlib.Path("run")))  # nothing is left to train
    assert [step.jitted._cache_size() for step in steps] == [1, 0]


def test_finetuning_pretrains_once_and_keeps_the_result(capsys):
    options = {"from_scratch": False, "pretrain_epochs": 1, "epochs": 1, "width": 0.125}
    other = pathlib.Path("runs/pretrain-other")
    other.mkdir(parents=True)
    (other / "config.json").write_text(json.dumps(PretrainConfig().to_json()))
    main(tiny(out=pathlib.Path("a"), **options))
    printed = capsys.readouterr().out
    assert "runs/pretrain-other is not what to start from: it is not complete; --check" in printed
    assert "pretraining on mnist5k once" in printed
    # Kernels without float gradients can fine-tune what the default ones have pretrained.
    main(tiny(out=pathlib.Path("b"), implementation="packed", **options))
    printed = capsys.readouterr().out
    assert "starting from the pretrained model" in printed
    assert "pretraining" not in printed
    # One that experiments.pretrain made is as good, if its options are those.
    (made,) = pathlib.Path("runs/pretrained").iterdir()
    shutil.move(made, other.with_name("mine"))
    main(tiny(out=pathlib.Path("c"), **options))
    printed = capsys.readouterr().out
    assert "starting from the pretrained model in runs/mine\n" in printed
    assert "pretraining" not in printed
    a, c = (json.loads(pathlib.Path(f, "summary.json").read_text()) for f in "ac")
    assert a["validation_loss"] == c["validation_loss"]


def test_a_pretraining_has_the_forward_pass_of_what_it_is_for():
    for recipe, wanted in (("fqt1", "qat"), ("qat_activations", "qat_activations")):
        config = FinetuneConfig(recipe=recipe, threshold="learned")
        assert pretraining(config, 8).build_recipe() == dataclasses.replace(
            fqt.recipe_by_name(wanted), threshold="learned"
        )


def test_a_pretraining_that_is_not_what_to_start_from_is_told_why():
    wanted = PretrainConfig(image_size=16, seed=1)
    assert newest_pretraining(wanted) == (None, "")
    folder = pathlib.Path("runs/pretrain-mine")
    (folder / "checkpoints/step_00000001").mkdir(parents=True)
    summary = dict.fromkeys(summaries._NAMES, 0) | {"resolved": {"image_size": 16}}
    (folder / "summary.json").write_text(json.dumps(summary))
    for options, why_not in (
        ({"seed": 1}, ""),
        ({"seed": 1, "diagnose": True, "log": "tensorboard"}, ""),
        ({"seed": 0, "epochs": 9}, "epochs is 9, not 8, seed is 0, not 1"),
        ({"seed": 1, "image_size": 8}, "image_size is 8, not 16"),
    ):
        text = json.dumps(PretrainConfig(**options).to_json())
        (folder / "config.json").write_text(text)
        assert newest_pretraining(wanted) == (folder, why_not)
    (folder / "config.json").write_text("{")
    assert newest_pretraining(wanted) == (folder, "it is damaged or of another version")


def test_a_pretraining_that_another_process_makes_is_waited_for(capsys):
    options = {"from_scratch": False, "pretrain_epochs": 1, "epochs": 1, "width": 0.125}
    main(tiny(out=pathlib.Path("a"), cache=pathlib.Path("made"), **options))
    (made,) = pathlib.Path("made").iterdir()
    other = pathlib.Path("other", made.name)
    other.mkdir(parents=True)
    held = threading.Event()

    def make() -> None:
        with locks.locked(other):
            held.set()
            deadline = time.monotonic() + 60
            while "waiting for another process" not in capsys.readouterr().out:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            shutil.copytree(made, other, dirs_exist_ok=True)

    thread = threading.Thread(target=make)
    thread.start()
    held.wait()
    main(tiny(out=pathlib.Path("b"), cache=pathlib.Path("other"), **options))
    thread.join()
    printed = capsys.readouterr().out
    assert f"starting from the pretrained model in {other}" in printed
    assert "pretraining on" not in printed
    a, b = (json.loads(pathlib.Path(f, "summary.json").read_text()) for f in ("a", "b"))
    assert a["validation_loss"] == b["validation_loss"]


def test_a_pretraining_that_is_stopped_goes_on_by_the_same_command(monkeypatch, capsys):
    options = {"from_scratch": False, "pretrain_epochs": 2, "epochs": 1, "width": 0.125}
    train_epoch = runner._Run._train_epoch

    def stopping(self, *args):
        train_epoch(self, *args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner._Run, "_train_epoch", stopping)
    # In its last epoch too: a signal never only ends the pretraining.
    for _ in range(2):
        with pytest.raises(process.Interrupted, match="the same command continues with the pretr"):
            main(tiny(**options))
        assert not pathlib.Path("run").exists()
    monkeypatch.setattr(runner._Run, "_train_epoch", train_epoch)
    main(tiny(**options))
    assert re.search(r"pretrained\S+ from \S+, after step (\d+) of \1\n", capsys.readouterr().out)


@pytest.mark.parametrize("recipe", ["qat", "qat_activations"])
def test_pretrained_checkpoints_start_a_finetuning(recipe):
    """Those of the first of two steps, too, whose weights are float."""
    pretrain(
        PretrainConfig(
            dataset="digits",
            recipe=recipe,
            model="vgg_small",
            width=0.25,
            image_size=8,
            limit=64,
            batch_size=32,
            epochs=1,
            out=pathlib.Path("source"),
        )
    )
    main(tiny(from_scratch=False, checkpoint=pathlib.Path("source"), epochs=1))
    summary = json.loads(pathlib.Path("run/summary.json").read_text())
    assert summary["start"].startswith("source/checkpoints/step_")
    with pytest.raises(CheckpointError, match="of another model"):
        main(
            tiny(
                from_scratch=False,
                checkpoint=pathlib.Path("source"),
                width=0.5,
                out=pathlib.Path("x"),
            )
        )
    assert not pathlib.Path("x").exists()


def test_learned_scales_go_on_from_those_of_the_start():
    main(tiny(epochs=1, recipe="qat", scale="learned_from_one", out=pathlib.Path("source")))
    config = tiny(scale="learned", from_scratch=False, checkpoint=pathlib.Path("source"))
    start = latest_checkpoint(pathlib.Path("source/checkpoints"))
    model = build_task(config, load_dataset(config), start).model
    saved = {k: v for k, v in parameters("source").items() if k.startswith("params.")}
    names = [
        k for k in saved if k.endswith(".scale") and f"{k.removesuffix('scale')}kernel" in saved
    ]
    assert names
    for name in names:
        _, _, _, layer, _ = name.split(".")
        scale = np.asarray(model.features.layers[int(layer)].scale[...])
        np.testing.assert_array_equal(scale, saved[name])
        assert np.ptp(scale) > 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dataset": "imagenet"}, ValueError, "unknown data set|imagenet"),
        ({"recipe": "fqt2"}, cli.UserError, "unknown recipe 'fqt2'; known recipes: full_precision"),
        ({"optimizer": "adamm"}, cli.UserError, "unknown optimizer 'adamm'"),
        ({"implementation": "cuda"}, cli.UserError, "unknown implementation 'cuda'"),
        ({"learning_rate": float("nan")}, cli.UserError, "learning_rate must be a number from 0"),
        ({"bits": 9}, cli.UserError, "bits must be an integer from 1 to 8; got 9"),
        ({"bits": 0}, cli.UserError, "bits must be an integer from 1 to 8; got 0"),
        ({"keep": 0.0}, cli.UserError, r"keep must be a number in \(0, 1\]"),
        ({"recipe": "qat", "bits": 2}, cli.UserError, "does not quantize gradients"),
        ({"batch_size": 5000, "limit": None}, cli.UserError, "batch_size is 5000, but digits has"),
        (
            {"freeze": "stem"},
            ValueError,
            "no parameter is matched by freeze='stem'; there are",
        ),
        (
            {"cache": pathlib.Path("c")},
            cli.UserError,
            "cache has no effect: with checkpoint",
        ),
        ({"pretrain_seed": 0}, cli.UserError, "pretrain_seed has no effect: with checkpoint"),
        ({"image_size": 1}, ValueError, "images must be at least 4x4"),
        ({"recipe": "full_precision", "diagnose": True}, cli.UserError, "diagnose needs a binary"),
        ({"dataset": "cifar10"}, ValueError, "cifar10"),
        ({"checkpoint": pathlib.Path("gone"), "from_scratch": False}, CheckpointError, "gone"),
        ({"weights": pathlib.Path("w.pth"), "from_scratch": False}, cli.UserError, "w.pth is not"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(changes, error, message, tmp_path):
    elsewhere = {"data_dir": tmp_path / "data"} if "dataset" in changes else {}
    with pytest.raises(error, match=message):
        main(tiny(**elsewhere, **changes))
    assert not pathlib.Path("run").exists()


def test_a_batch_that_is_too_large_is_named_before_pretraining(capsys):
    with pytest.raises(cli.UserError, match="batch_size is 5000"):
        main(tiny(batch_size=5000, limit=None, from_scratch=False))
    assert "pretraining" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "vgg12"}, "unknown model 'vgg12'; known models"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"width": 0.0}, "width must be positive and at most 16"),
        ({"width": 17.0}, "width must be positive and at most 16"),
        ({"image_size": 5000}, "image_size must be at most 4096; got 5000"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"batch_size": 97}, "batch_size is 97, but limit leaves only 96 images"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"save_minutes": 0.0}, "save_minutes must be a positive number"),
        ({"warmup_epochs": 3.0}, "warmup_epochs must be at least 0 and below epochs, which is 3"),
        ({"cosine_epochs": 2}, "cosine_epochs must divide the 3 epochs after warm-up; got 2"),
        ({"cosine_epochs": 1, "schedule": "constant"}, "cosine_epochs has no effect on a constant"),
        ({"clip_norm": -1.0}, "clip_norm must be a positive number"),
        ({"ema_decay": 0.0}, r"ema_decay must be in \(0, 1\)"),
        ({"momentum": 0.9}, "momentum has no effect on adam: it is of sgd"),
        ({"stem": "small"}, "stem has no effect on vgg_small: it is of ResNet, MobileNet and ViT"),
        ({"freeze": "("}, "freeze must be a regular expression"),
        ({"recipe": "psq1", "sampler": "uniform"}, "sampler has no effect: nothing is pruned"),
        ({"one_draw": True, "importance": "norm"}, "importance has no effect: one_draw draws by"),
        ({"recipe": "full_precision", "clip": False}, "clip has no meaning in a full-precision"),
        ({"recipe": "qat_activations", "scale": "none"}, "scale has no meaning where weights are"),
        ({"recipe": "qat_activations", "bits": 4}, "does not quantize gradients: bits cannot be"),
        ({"recipe": "qat_activations", "one_draw": True}, "prunes nothing: one_draw cannot be set"),
        ({"pretrain_epochs": 2}, "pretrain_epochs has no effect: with checkpoint, weights or from"),
        ({"seed": -1}, "seed must be from 0"),
        ({"resume": pathlib.Path("x")}, "either out"),
        ({"checkpoint": pathlib.Path("x")}, "only one of checkpoint, weights and from-scratch"),
        ({"pretrain_epochs": 0, "from_scratch": False}, "pretrain_epochs must be at least 1"),
    ],
)
def test_bad_options_are_refused_on_construction(changes, message):
    with pytest.raises(cli.UserError, match=message):
        tiny(**changes)


def test_run_folders_are_never_overwritten_nor_mixed_up():
    pathlib.Path("run").mkdir()
    with pytest.raises(cli.UserError, match=r"not a run: it has no config\.json"):
        main(FinetuneConfig(resume=pathlib.Path("run")))
    pathlib.Path("run/theirs").touch()
    with pytest.raises(cli.UserError, match=r"the folder run exists already: choose another one\."):
        main(tiny())
    assert [path.name for path in pathlib.Path("run").iterdir()] == ["theirs"]
    pathlib.Path("run/config.json").write_text("{")
    with pytest.raises(cli.UserError, match=r"the folder run exists already.*--resume run"):
        main(tiny())
    with pytest.raises(cli.UserError, match="damaged"):
        main(FinetuneConfig(resume=pathlib.Path("run")))
    pathlib.Path("run/config.json").write_text(json.dumps(tiny(seed=3).to_json()))
    with pytest.raises(cli.UserError, match="seed is 3 in the run run; it cannot be changed to 4"):
        main(FinetuneConfig(resume=pathlib.Path("run"), seed=4))


def test_options_survive_a_round_trip_through_json():
    config = tiny(data_dir=pathlib.Path("data"), bits=2)
    values = json.loads(json.dumps(config.to_json()))
    pathlib.Path("run").mkdir()
    pathlib.Path("run/config.json").write_text(json.dumps(values))
    assert read_config(FinetuneConfig(), pathlib.Path("run")) == dataclasses.replace(
        config, out=None
    )


def test_options_that_an_older_version_wrote_are_read():
    """It wrote defaults where they had no effect, and knew fewer options."""
    new = ("warmup_epochs", "cosine_epochs", "clip_norm", "ema_decay", "freeze", "patience", "log")
    values = {name: value for name, value in tiny().to_json().items() if name not in new}
    old = values | {"momentum": 0.9, "pretrain_epochs": 8}
    assert config_from_json(FinetuneConfig, old) == dataclasses.replace(tiny(), out=None)
    with pytest.raises(cli.UserError, match="momentum has no effect"):
        config_from_json(FinetuneConfig, old | {"momentum": 0.8})


def test_options_are_read_from_a_file_and_changed_on_the_command_line(capsys):
    config = tiny(data_dir=pathlib.Path("data"), keep=0.5, width=1, flip=False, out=None)
    pathlib.Path("options.json").write_text(json.dumps(config.to_json()))
    file = ["--config", "options.json"]
    assert cli.parse(FinetuneConfig, file) == config
    changed = cli.parse(FinetuneConfig, ["--epochs", "7", *file, "--flip", "True", "--one-draw"])
    expected = dataclasses.replace(config, epochs=7, flip=True)
    assert dataclasses.replace(changed, one_draw=False) == expected
    # What fits only with what stands on the command line.
    pathlib.Path("options.json").write_text('{"momentum": 0.5, "sampler": "topk"}')
    changed = cli.parse(FinetuneConfig, [*file, "--optimizer", "sgd"])
    assert (changed.momentum, changed.sampler) == (0.5, "topk")
    with pytest.raises(cli.UserError, match="momentum has no effect on adam"):
        cli.parse(FinetuneConfig, file)
    with pytest.raises(cli.UserError, match="--config needs the name of a file"):
        cli.parse(FinetuneConfig, ["--config", "--one-draw"])
    with pytest.raises(SystemExit):
        cli.parse(FinetuneConfig, [*file, "--help"])
    assert "--config FILE reads options from a JSON file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"epoch": 3}', "options.json: unknown option 'epoch'; did you mean epochs"),
        ('{"zzz": 3}', "options.json: unknown option 'zzz'; known: dataset, model,"),
        ('{"epochs": "3"}', "options.json: epochs must be int; got '3'"),
        ('{"epochs": true}', "options.json: epochs must be int; got True"),
        ('{"limit": 1.5}', "options.json: limit must be int or null; got 1.5"),
        ('{"prune": "rows"}', "prune must be 'channels', 'shared' or null; got 'rows'"),
        ("[1]", r"options.json must hold a JSON object of options; got \[1\]"),
        ("{", "options.json is no JSON: "),
    ],
)
def test_a_file_of_options_that_is_wrong_is_named(text, message):
    pathlib.Path("options.json").write_text(text)
    with pytest.raises(cli.UserError, match=message) as caught:
        cli.parse(FinetuneConfig, ["--config", "options.json"])
    assert "\n" not in str(caught.value)


def test_parts_of_a_recipe_can_be_changed():
    recipe = RunConfig(bits=2, prune="shared", importance="norm").build_recipe()
    assert recipe.gradient is not None
    assert (recipe.gradient.bits, recipe.gradient.keep_fraction) == (2, 0.5)
    assert (recipe.gradient.prune, recipe.gradient.importance) == ("shared", "norm")


def call(*arguments: str, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "experiments.finetune", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "fqt2", "--from-scratch"), "unknown recipe 'fqt2'"),
        (("--epochs", "0"), "epochs must be at least 1"),
        (
            ("--from-scratch", "--model", "vgg_small", "--width", "0.1", "--out", "/proc/run"),
            "/proc",
        ),
    ],
)
def test_the_command_line_gives_one_line_and_a_status(arguments, message, tmp_path):
    result = call(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_weights_of_others_start_a_run_and_normalize_its_images(capsys, monkeypatch):
    """A VGG in PyTorch's form, on colour images of a user's own, through resume and export."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    np.savez("mine.npz", images=images, labels=np.arange(80) % 4)
    kernels = {"features.0": (16, 3, 3, 3), "features.3": (16, 16, 3, 3)}
    state = {f"{k}.weight": rng.normal(size=v).astype(np.float32) for k, v in kernels.items()}
    state["classifier.6.weight"] = np.zeros((9, 9), np.float32)
    for place in (1, 4):
        for field in ("weight", "bias", "running_mean", "running_var"):
            state[f"features.{place}.{field}"] = rng.uniform(0.5, 2, 16).astype(np.float32)
    safetensors.numpy.save_file(state, "w.safetensors")
    options = {
        "dataset": "npz",
        "data_dir": pathlib.Path("mine.npz"),
        "from_scratch": False,
        "weights": pathlib.Path("w.safetensors"),
        "width": 1,
        "limit": None,
        "batch_size": 16,
    }
    monkeypatch.setitem(MODELS, "vgg_small", functools.partial(VGG, ((16, 16),)))
    main(tiny(epochs=1, **options))
    printed = capsys.readouterr().out
    assert "w.safetensors (10 loaded, " in printed
    assert "new: head: classifier.6.weight is [9, 9], not [4, 16]" in printed
    exporting.main(exporting.ExportConfig(pathlib.Path("run"), pathlib.Path("m.safetensors")))
    about = export.describe("m.safetensors")
    np.testing.assert_allclose(about["mean"], np.array([0.485, 0.456, 0.406]) * 255, rtol=1e-6)


def test_grey_images_do_not_go_with_weights_of_coloured_ones():
    pathlib.Path("w.safetensors").touch()
    with pytest.raises(ValueError, match=r"digits has grey images, and w.safetensors is of col"):
        main(tiny(from_scratch=False, weights=pathlib.Path("w.safetensors")))
