"""Runs that diverge, and runs whose files were damaged or removed before they are resumed."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli
from experiments.runs import folders, reporting, runner, summaries, tasks
from experiments.runs.finetuning import FinetuneConfig, build_task, main
from fqt_jax.checkpoints import (
    list_checkpoints,
    nonfinite_arrays,
    read_metadata,
    restore_checkpoint,
)
from tests.experiments.test_finetune import lines, tiny

pytestmark = pytest.mark.usefixtures("relaxed_promotion", "own_folder", "tiny_vgg")

RUN = pathlib.Path("run")
CHECKPOINTS = RUN / "checkpoints"
EPOCH = 6
"""Steps of an epoch."""


def config(**changes) -> FinetuneConfig:
    return tiny(**{"batch_size": 16, **changes})


def resume() -> None:
    main(FinetuneConfig(resume=RUN))


def steps_saved() -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(CHECKPOINTS)]


def after_step(monkeypatch, at, change) -> list[int]:
    """Lets ``change`` alter the state after a step; gives the steps that are taken."""
    original, taken = runner.build_train_step, []

    def make(*args, **kwargs):
        step = original(*args, **kwargs)

        def wrapped(state, *rest):
            state, loss = step(state, *rest)
            taken.append(int(state.step))
            return (change(state) if taken[-1] == at else state), loss

        return wrapped

    monkeypatch.setattr(runner, "build_train_step", make)
    return taken


def broken(state):
    """The state with one parameter that is not a number, as after an update that overflows."""
    bias = state.params["head"]["bias"]
    bias[...] = jnp.full_like(bias[...], jnp.nan)
    return state


def interrupted(state):
    os.kill(os.getpid(), signal.SIGTERM)
    return state


def last_good(step: int) -> str:
    return f"The run's last good checkpoint is {CHECKPOINTS / f'step_{step:08d}'}."


def test_an_epochs_last_update_that_is_not_finite_is_not_saved(monkeypatch):
    after_step(monkeypatch, 2 * EPOCH, broken)
    with pytest.raises(runner.Diverged) as caught:
        main(config())
    assert str(caught.value).startswith("1 of ")
    assert str(caught.value).endswith(
        f"arrays are not finite after step {2 * EPOCH}, params.head.bias for one, in epoch 2: "
        f"lower the learning rate. {last_good(EPOCH)}"
    )
    assert steps_saved() == [EPOCH]
    assert len(lines(RUN)) == 1


@pytest.mark.parametrize("at", [1, EPOCH + 2])
def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(monkeypatch, at):
    taken = after_step(monkeypatch, at, broken)
    with pytest.raises(runner.Diverged) as caught:
        main(config(epochs=9))
    epoch = at // EPOCH + 1
    left = last_good(EPOCH) if epoch > 1 else "The run's first checkpoint was yet to come."
    assert str(caught.value) == (
        f"the loss became nan at step {at + 1}: it began in the update before it, of the layer "
        f"head, in epoch {epoch}: lower the learning rate. {left}"
    )
    assert taken[-1] <= at + 1 + runner._IN_FLIGHT
    assert steps_saved() == [EPOCH] * (epoch - 1)


def test_the_layer_where_a_loss_stops_to_be_finite_is_named(monkeypatch):
    """One parameter after another grows too large, in the first epoch and after it."""
    places = [(EPOCH + 2, ("head",), "in the layer head")]
    places += [(2, ("features", "layers", 4), "in the layer features/layers/4")]
    for at, path, where in places:
        original = runner.build_train_step

        def grow(state, path=path):
            part = state.params
            for name in path:
                part = part[name]
            part["kernel"][...] = jnp.full_like(part["kernel"][...], 3e38)
            return state

        after_step(monkeypatch, at, grow)
        with pytest.raises(runner.Diverged, match=f"at step {at + 1}: it began {where}, in epoch"):
            main(config())
        monkeypatch.setattr(runner, "build_train_step", original)
        shutil.rmtree(RUN, ignore_errors=True)


@pytest.mark.parametrize("at", [EPOCH + 2, EPOCH + 3, 2 * EPOCH])
def test_a_state_that_is_not_finite_is_not_saved_when_the_run_is_stopped(monkeypatch, at):
    """The signal comes with the update that breaks the state, or with the step after it."""
    after_step(monkeypatch, EPOCH + 2, broken)
    after_step(monkeypatch, at, interrupted)
    with pytest.raises(runner.Diverged, match=last_good(EPOCH)):
        main(config())
    assert steps_saved() == [EPOCH]
    assert nonfinite_arrays(restored(CHECKPOINTS / f"step_{EPOCH:08d}")) == []


def restored(path: pathlib.Path):
    own = dataclasses.replace(config(), out=None)
    task = build_task(own, tasks.load_dataset(own), None)
    state = runner._Run(own, task, RUN, "finetune", {}, 0).state
    return restore_checkpoint(path, state)


def test_what_a_run_lost_is_trained_again_to_the_same_numbers(capsys):
    """Its last checkpoint is damaged: it goes on from the one before."""
    main(config())
    whole, summary = lines(RUN), json.loads((RUN / "summary.json").read_text())
    newest, before = list_checkpoints(CHECKPOINTS)[:2]
    assert steps_saved()[:2] == [3 * EPOCH, 2 * EPOCH]
    expected = jax.tree.leaves(restored(newest).params)
    (RUN / "summary.json").unlink()
    (newest / "metadata.json").write_text("{}")
    capsys.readouterr()
    resume()
    printed = capsys.readouterr().out
    assert f"warning: the checkpoint {newest.absolute()} is damaged: changed: metadata.json." in (
        printed
    )
    assert f"resuming run from {before.name}, after step {2 * EPOCH} of {3 * EPOCH}" in printed
    assert lines(RUN) == whole
    timed = {"seconds": 0, "step_ms": 0, "wait_fraction": 0}
    again = json.loads((RUN / "summary.json").read_text())
    assert {**again, **timed} == {**summary, **timed}
    assert list_checkpoints(CHECKPOINTS)[:2] == [newest, before]
    for got, wanted in zip(jax.tree.leaves(restored(newest).params), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_full_disk_is_an_error_that_names_the_run(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(reporting, "plot_curves", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        main(config(epochs=1))
    assert caught.value.filename == "run"
    assert steps_saved() == [EPOCH]


def test_metrics_behind_the_checkpoint_are_made_up_for():
    main(config(epochs=2))
    whole = (RUN / "metrics.jsonl").read_text()
    (RUN / "summary.json").unlink()
    (RUN / "metrics.jsonl").unlink()
    resume()
    assert (RUN / "metrics.jsonl").read_text() == whole


def test_a_run_of_which_no_checkpoint_is_whole_is_not_begun_again(capsys):
    main(config(epochs=2))
    (RUN / "summary.json").unlink()
    paths = list_checkpoints(CHECKPOINTS)
    for path in paths:
        (path / "metadata.json").unlink()
    with pytest.raises(cli.UserError) as caught:
        resume()
    damage = [f"the checkpoint {p.absolute()} is damaged: missing: metadata.json" for p in paths]
    assert str(caught.value) == (
        f"cannot resume run: none of its checkpoints can be read: {'; '.join(damage)}. "
        "Put a checkpoint back there, or begin again in another folder."
    )
    shutil.rmtree(CHECKPOINTS)
    with pytest.raises(cli.UserError) as caught:
        resume()
    assert str(caught.value) == (
        "cannot resume run: it was trained for 2 epochs, but run/checkpoints has no checkpoint. "
        "Put a checkpoint back there, or begin again in another folder."
    )
    assert len(lines(RUN)) == 2


def test_a_run_that_saved_nothing_yet_begins_at_step_0_and_says_so(capsys):
    RUN.mkdir()
    folders.write_config(config(epochs=1), RUN)
    resume()
    assert f"starting run at step 0 of {EPOCH}\n" in capsys.readouterr().out
    assert steps_saved() == [EPOCH]


def test_a_run_that_was_to_save_later_begins_again(capsys):
    """As the short runs of a sweep do: an epoch's line is no sign of a checkpoint there."""
    own = dataclasses.replace(config(epochs=1), out=None)
    task = build_task(own, tasks.load_dataset(own), None)
    RUN.mkdir()
    for _ in range(2):
        runner.train(own, task, RUN, "finetune", save_seconds=3600)
        assert steps_saved() == []
        (RUN / "summary.json").unlink()
    assert capsys.readouterr().out.count(f"starting run at step 0 of {EPOCH}\n") == 2


def test_a_damaged_summary_is_named_and_can_be_made_again():
    main(config(epochs=1))
    path = RUN / "summary.json"
    summary = json.loads(path.read_text())
    for text, what in (
        (b"", "Expecting value"),
        (b'{"experiment": "finet', "Unterminated string"),
        (b"[1]", "cannot convert"),
        (b"{}", "it has no dataset"),
        (b"\xff", "can't decode byte"),
    ):
        path.write_bytes(text)
        message = rf"run/summary\.json is damaged: .*{what}.* Remove it and resume"
        with pytest.raises(cli.UserError, match=message):
            resume()
    path.unlink()
    resume()
    assert json.loads(path.read_text()).keys() == summary.keys()
    assert json.loads(path.read_text())["test_loss"] == summary["test_loss"]
    # Which older ones lack.
    new = {"wait_fraction", "resolved", "stopped", "tested_epoch", "checkpoint", "samples"}
    assert summary.keys() == summaries._NAMES | new
    assert read_metadata(list_checkpoints(CHECKPOINTS)[0])["history"] == lines(RUN)
