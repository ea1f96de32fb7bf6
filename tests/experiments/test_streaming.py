"""Streams of images: the same bytes from any number of workers, whole runs, and what goes wrong."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import cli, process
from experiments.data import DataError, Dataset, Split, Streamed, catalog, epoch_order, load
from experiments.data.ahead import made_ahead
from experiments.data.schedule import Schedule
from experiments.estimators import EstimatorsConfig
from experiments.estimators import main as estimators
from experiments.pipeline import PipelineConfig
from experiments.pipeline import main as time_pipeline
from experiments.runs import batches as run_batches
from experiments.runs import exporting, runner
from experiments.runs.config import RunConfig
from experiments.runs.finetuning import main
from experiments.runs.steps import build_eval_step, evaluate
from experiments.runs.tasks import build_task, load_dataset
from fqt_jax.checkpoints import read_metadata
from fqt_jax.training import create_state
from tests.experiments.test_files import FORMS, folder_of, gradient, truncated
from tests.experiments.test_finetune import latest_checkpoint, lines, parameters, tiny

pytestmark = pytest.mark.usefixtures("relaxed_promotion", "own_folder", "tiny_vgg")

ROOT = pathlib.Path(__file__).parents[2]


def photos(forms=tuple(FORMS), copies=3, **options) -> Dataset:
    """A streamed folder of images in several forms, a grey one and one of 16 bits among them."""
    root = folder_of({"a": list(forms), "b": list(forms)}, copies=copies)
    grey = gradient()[..., 0]
    for name, dtype, scale in (("grey", np.uint8, 1), ("deep", np.uint16, 257)):
        Image.fromarray(grey.astype(dtype) * scale).save(root / "b" / f"{name}.png")
    options = {"image_size": 12, "validation_fraction": 0.2, "stream": "yes", **options}
    return load("folder", data_dir=root, **options)


def schedule(data: Dataset, **options) -> Schedule:
    options = {"batch_size": 8, "epochs": 2, "seed": 3, **options}
    return Schedule(data.train, data.validation, data.test, **options)


def content(made) -> list[dict[str, bytes]]:
    return [{name: array.tobytes() for name, array in batch.items()} for batch in made]


def test_any_number_of_workers_and_any_beginning_give_the_same_bytes(capfd):
    whole = schedule(photos())
    expected = content(whole[i] for i in range(len(whole)))
    assert len({batch["image"] for batch in expected}) > len(expected) - 4  # validation repeats
    for workers, first in ((0, 0), (1, 2), (2, 1)):
        with made_ahead(whole, first, workers) as made:
            assert content(made) == expected[first:], (workers, first)
    with made_ahead(whole, 0, 1) as made:  # left early
        assert content([next(made)]) == expected[:1]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("stratify", [False, True])
def test_batches_come_in_the_order_of_the_epochs(stratify):
    data = load("digits", limit=60, stream="yes")
    made = schedule(data, stratify=stratify, test_each_epoch=True)
    labels = data.train.labels
    for epoch in range(2):
        by = labels if stratify else None
        order = epoch_order(60, 8, 3, epoch, labels=by)
        first = made.start("train", epoch)
        for step, indices in enumerate(order):
            batch = made[first + step]
            np.testing.assert_array_equal(batch["label"], labels[indices])
            expected = data.train.augmented(indices, 3, epoch, flip=True)
            np.testing.assert_array_equal(batch["image"], expected)
            assert "valid" not in batch
    for part, epoch in (
        ("validation", 0),
        ("test", 0),
        ("validation", 1),
        ("test", 1),
        ("test", 2),
    ):
        first, examples = made.start(part, epoch), getattr(data, part)
        found = [made[first + i] for i in range(made.batches(part))]
        valid = np.concatenate([batch["valid"] for batch in found])
        images, labels_found = (
            np.concatenate([b[name] for b in found])[valid] for name in ("image", "label")
        )
        np.testing.assert_array_equal(images, examples.first(len(examples)))
        np.testing.assert_array_equal(labels_found, examples.labels)
        assert {len(batch["image"]) for batch in found} == {8}
    assert len(made) == made.start("test", 2) + made.batches("test")


def test_a_view_belongs_to_seed_epoch_and_example_not_to_the_batch():
    data = photos(["flat.png"], copies=12).train
    alone = data.augmented(np.array([5]), 0, 1, flip=True)[0]
    among = data.augmented(np.array([2, 7, 5]), 0, 1, flip=True)
    np.testing.assert_array_equal(alone, among[2])
    for seed, epoch in ((0, 2), (1, 1)):
        assert (data.augmented(np.array([5]), seed, epoch, flip=True)[0] != alone).any()
    both = np.stack([data.augmented(np.array([5]), 0, 1, flip=flip)[0] for flip in (True, False)])
    assert (both[0] == both[1]).all() or (both[0] == both[1][:, ::-1]).all()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_seen_as_the_same_picture(form):
    folder_of({"a": [form], "b": [form]})
    data = load("folder", data_dir="photos", image_size=14, stream="yes")
    view = data.train.first(1)[0].astype(int)
    assert view.shape == (14, 14, 3)
    upright = Image.fromarray(gradient()).resize((24, 16), Image.Resampling.BILINEAR)
    expected = np.asarray(upright.crop((5, 1, 19, 15))).astype(int)
    tolerance = 24 if form == "print.jpeg" else 10
    assert np.abs(view - expected).max() <= tolerance
    random = data.train.augmented(np.arange(4), 0, 0, flip=True).astype(int)
    assert np.abs(random[..., 2] - 128).max() <= tolerance  # blue is the same everywhere


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_is_cut_short_is_named(workers, capfd):
    root = folder_of({"a": ["photo.jpg"], "b": ["photo.jpg"]})
    for split in ("train", "test"):
        (root / split).mkdir()
    for name in ("a", "b"):
        (root / name).rename(root / "train" / name)
    folder_of({"a": ["flat.png"], "b": ["flat.png"]}, "photos/test")
    truncated(root / "train")
    data = load("folder", data_dir=root, image_size=8, stream="yes", validation_fraction=0.1)
    named = r"train/a/0-photo.jpg: not a readable image: image file is truncated"
    with (
        pytest.raises(DataError, match=named) as caught,
        made_ahead(schedule(data, batch_size=2), 0, workers) as made,
    ):
        content(made)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_no_image_is_named_at_once():
    root = folder_of({"a": ["photo.jpg"], "b": ["photo.jpg"]})
    (root / "a" / "x.png").write_text("text")
    with pytest.raises(DataError, match=r"a/x.png: not a readable image: cannot identify"):
        load("folder", data_dir=root, image_size=8, stream="yes")


def test_a_worker_that_is_killed_ends_the_stream_in_one_line():
    made = schedule(photos(), epochs=500)
    killed = r"^a process that reads images was killed, perhaps .*: try fewer workers.$"
    with made_ahead(made, 0, 2) as ahead:
        next(ahead)
        commands = {
            p: pathlib.Path(f"/proc/{p}/cmdline").read_text() for p in children(os.getpid())
        }
        workers = [p for p, command in commands.items() if "spawn_main" in command]
        os.kill(workers[0], signal.SIGKILL)
        with pytest.raises(RuntimeError, match=killed):
            content(ahead)


def children(parent: int) -> list[int]:
    """The processes that a process started and that are not over."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            after = stat.read_text().rpartition(")")[2].split()
            if int(after[1]) == parent and after[0] != "Z":
                found.append(int(stat.parent.name))
    return found


ENDLESS = """
from experiments import process
from experiments.data import load
from experiments.data.ahead import made_ahead
from experiments.data.schedule import Schedule

if __name__ == "__main__":
    process.install()
    data = load("digits", limit=60, stream="yes")
    with made_ahead(Schedule(data.train, data.validation, data.test, 8, 10**6), 0, 2) as made:
        next(made)
        print("begun", flush=True)
        for _ in made:
            pass
"""


@pytest.mark.parametrize(
    ("number", "status", "error"),
    [
        (signal.SIGINT, 130, "interrupted.\n"),
        pytest.param(signal.SIGTERM, 143, "terminated.\n", marks=pytest.mark.slow),
        (signal.SIGKILL, -9, ""),
    ],
)
def test_no_process_outlives_the_first_one(number, status, error):
    pathlib.Path("endless.py").write_text(ENDLESS)
    with subprocess.Popen(
        [sys.executable, "endless.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    ) as first:
        assert first.stdout.readline() == "begun\n"
        started = children(first.pid)
        assert len(started) == 3  # and the one that cleans up
        # As a terminal does with Ctrl-C; whoever kills one process means that one.
        (os.killpg if number == signal.SIGINT else os.kill)(first.pid, number)
        # Standard error ends with the last process that has it open.
        assert first.communicate(timeout=60) == ("", error)
        assert first.returncode == status
    deadline = time.monotonic() + 60
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("stop_at", "workers"), [(4, 0), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_a_stopped_run_resumes_with_the_batches_of_an_unbroken_one(stop_at, workers, monkeypatch):
    options = {"stream": "yes", "epochs": 2, "stratify": True}
    main(tiny(out=pathlib.Path("whole"), **options))
    train_step = runner.build_train_step

    def interrupting(*args, **kwargs):
        step = train_step(*args, **kwargs)

        def wrapped(state, *rest):
            result = step(state, *rest)
            if int(result[0].step) == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            return result

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(runner, "build_train_step", interrupting)
        with pytest.raises(process.Interrupted, match=rf"stopped after step {stop_at} of 6 "):
            main(tiny(workers=workers, **options))
    main(tiny(out=None, resume=pathlib.Path("run"), workers=workers, **options))
    assert lines("run") == lines("whole")
    found, expected = parameters("run"), parameters("whole")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name
    histories = [read_metadata(latest_checkpoint(f"{f}/checkpoints")) for f in ("run", "whole")]
    assert histories[0]["history"] == histories[1]["history"]


def test_a_stream_is_evaluated_as_the_same_images_in_memory():
    config = tiny(stream="yes", limit=45)
    streamed = load_dataset(config)
    parts = [
        Split(part.first(len(part)), part.labels)
        for part in (streamed.train, streamed.validation, streamed.test)
    ]
    held = Dataset("digits", *parts, streamed.num_classes)
    assert [d.mean for d in (streamed, held)] == [held.mean] * 2
    model = build_task(config, held, None).model
    found = []
    for data in (streamed, held):
        graphdef, state = create_state(model, config.build_optimizer().build({}, 1), ("accuracy",))
        with contextlib.closing(run_batches.batches(config, data)) as made:
            step = build_eval_step(data, graphdef)
            found.append(
                [
                    evaluate(step, state, made.evaluate(part, epoch))
                    for part, epoch in (("validation", 2), ("test", 3), ("validation", 0))
                ]
            )
    assert len(held.test) % config.batch_size
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *found)


def test_a_whole_run_on_photographs_of_tensorflow_datasets(monkeypatch):
    begun = []

    def recorded(schedule, first, workers):
        begun.append((first, workers))
        return made_ahead(schedule, first, workers)

    monkeypatch.setattr(run_batches, "made_ahead", recorded)
    pytest.importorskip("array_record")
    prepared = pytest.importorskip("tests.experiments.test_prepared")
    counts = {"train": 36, "validation": 11, "test": 13}
    examples = {s: prepared.examples_of("oxford_flowers102", s, n) for s, n in counts.items()}
    prepared.prepare(pathlib.Path("data"), "oxford_flowers102", examples)
    config = tiny(
        dataset="oxford_flowers102",
        data_dir=pathlib.Path("data"),
        image_size=16,
        batch_size=12,
        epochs=2,
        stream="yes",
        workers=1,
        test_each_epoch=True,
    )
    main(config)
    assert begun == [(0, 1)]  # processes last for the whole run, evaluation included
    summary = json.loads(pathlib.Path("run/summary.json").read_text())
    assert (summary["steps"], summary["test_images"]) == (6, 13)
    assert 0 <= summary["wait_fraction"] <= 1
    assert [line["step"] for line in lines("run")] == [3, 6]
    about = exporting.description(config, load_dataset(config))
    encoded, label = examples["test"][0]
    pathlib.Path("photo.jpg").write_bytes(encoded)
    (seen,) = exporting.read_images(["photo.jpg"], about) * about["std"] + about["mean"]
    test = load_dataset(config).test
    same = [i for i, each in enumerate(test.first(99)) if np.allclose(each, seen, atol=1e-3)]
    assert [test.labels[i] for i in same] == [label]


def test_what_streams_where_nobody_says(monkeypatch):
    root = folder_of({"a": ["flat.png"], "b": ["flat.png"]})
    options = {"data_dir": root, "image_size": 8, "stream": "auto"}
    assert isinstance(load("folder", **options).train, Split)
    monkeypatch.setattr(catalog, "STREAMED_BYTES", 16 * 8 * 8 * 3 - 1)
    assert isinstance(load("folder", **options).train, Streamed)
    assert isinstance(load("folder", **options, limit=15).train, Split)
    assert isinstance(load("folder", **{**options, "stream": "no"}).train, Split)
    assert isinstance(load("digits", stream="auto").train, Split)  # in memory already


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream": "yes", "pad": 2}, "stream has random crops of its own: pad has no effect."),
        ({"stream": "no", "workers": 2}, "stream is no: workers have no effect."),
        ({"workers": 2}, "digits is held in memory: workers have no effect."),
        ({"workers": -1}, "workers must be at least 0; got -1."),
    ],
)
def test_an_option_without_effect_is_refused(options, message):
    with pytest.raises(cli.UserError, match=f"^{message}$"):
        load_dataset(RunConfig(**options))


def test_padding_of_what_turns_out_to_stream_is_refused(monkeypatch):
    monkeypatch.setattr(catalog, "STREAMED_BYTES", 1)
    folder_of({"a": ["flat.png"], "b": ["flat.png"]})
    config = RunConfig(dataset="folder", data_dir=pathlib.Path("photos"), pad=1, image_size=8)
    with pytest.raises(cli.UserError, match=r"folder is streamed, with .*: pad has no effect\.$"):
        load_dataset(config)


def test_an_experiment_that_holds_its_images_refuses_to_stream():
    with pytest.raises(cli.UserError, match="stream and workers have no effect here"):
        estimators(EstimatorsConfig(stream="yes"))


def test_reading_alone_is_timed(capsys):
    options = {"dataset": "digits", "batch_size": 16}
    time_pipeline(PipelineConfig(**options, workers=(0,), images=64))
    title, columns, _, row = capsys.readouterr().out.strip().split("\n")
    assert title == "digits, 16 x 16"
    assert columns.split()[:2] == ["workers", "images/s"]
    assert row.startswith("threads ")
    with pytest.raises(cli.UserError, match="images must be at least two batches; got 31"):
        PipelineConfig(**options, images=31)
    with pytest.raises(cli.UserError, match="batch_size is 2000 for 1080 training images"):
        time_pipeline(PipelineConfig("digits", batch_size=2000))
