"""One training run, from its options to its folder: data, model, steps, checkpoints, resume."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import functools
import json
import math
import pathlib
import shutil
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import reporting
from experiments.cli import Interrupted, UserError
from experiments.config import RunConfig
from experiments.data import Dataset, Split, epoch_order, load
from experiments.data.augment import augment, normalize
from fqt_jax.checkpoints import (
    latest_checkpoint,
    load_parameters,
    read_metadata,
    restore_checkpoint,
    save_checkpoint,
)
from fqt_jax.convert import ConversionTable, quantize
from fqt_jax.kernels import check_implementation
from fqt_jax.models import create_model
from fqt_jax.training import (
    Metrics,
    create_state,
    make_eval_step,
    make_train_step,
    reset_metrics,
)

_IN_FLIGHT = 4
"""Steps dispatched ahead of the device, so that it never waits, nor the user after Ctrl-C."""

Data = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a run trains: the data, the model, and how it starts."""

    dataset: Dataset
    model: nnx.Module
    table: ConversionTable
    start: str


def load_dataset(config: RunConfig) -> Dataset:
    """The run's data set, held in memory."""
    return load(
        config.dataset,
        image_size=config.image_size,
        validation_fraction=config.validation_fraction,
        data_dir=config.data_dir,
        limit=config.limit,
    )


def build_task(config: RunConfig, dataset: Dataset, checkpoint: pathlib.Path | None) -> Task:
    """Builds the quantized model, from random values or from a checkpoint.

    Raises:
      UserError, ValueError: an option does not fit.
      CheckpointError: the checkpoint is missing, damaged or of another model.
    """
    check_implementation(config.implementation)
    stem = config.stem
    if stem == "auto":
        stem = "imagenet" if min(dataset.image_size) >= 96 else "small"
    float_model = create_model(
        config.model,
        num_classes=dataset.num_classes,
        in_features=dataset.channels,
        width=config.width,
        stem=stem,
        rngs=nnx.Rngs(config.seed),
    )
    start = "random values"
    if checkpoint is not None:
        fresh = load_parameters(checkpoint, float_model, new_head="head")
        start = f"{checkpoint}" + (" with a new head" if fresh else "")
    model, table = quantize(
        float_model,
        config.build_recipe(),
        implementation=config.implementation,
        rngs=nnx.Rngs(config.seed + 1),
    )
    return Task(dataset, model, table, start)


def new_folder(config: RunConfig, kind: str) -> pathlib.Path:
    """Creates the run's folder.

    Raises:
      UserError: it exists already.
      OSError: it cannot be created.
    """
    if config.out is None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{kind}-{config.dataset}-{config.model}-{config.recipe}-{stamp}"
        folder = pathlib.Path("runs") / name
    else:
        folder = config.out
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"the run folder {folder} exists already: choose another one, or continue that run "
            f"by --resume {folder}."
        ) from None
    return folder


def train(config: RunConfig, task: Task, folder: pathlib.Path, kind: str) -> dict[str, Any]:
    """Trains, from the start or from the folder's last checkpoint, to the end.

    Writes to the folder after each epoch: a line of ``metrics.jsonl``, a checkpoint, and the
    picture of the curves; at the end ``summary.json``, with the accuracy on the test split, which
    nothing before has looked at.

    Args:
      config: the options.
      task: the data and the model.
      folder: the run's folder; it exists.
      kind: name of the experiment, for messages.

    Returns:
      The summary.

    Raises:
      Interrupted: a signal stopped the run; its state is saved.
      UserError: the loss is not a number any more.
    """
    return _Run(config, task, folder, kind).go()


class _Run:
    def __init__(self, config: RunConfig, task: Task, folder: pathlib.Path, kind: str):
        self.config, self.task, self.folder, self.kind = config, task, folder, kind
        dataset = task.dataset
        if config.batch_size > len(dataset.train):
            raise UserError(
                f"batch_size is {config.batch_size}, but {config.dataset} has only "
                f"{len(dataset.train)} training images."
            )
        self.steps_per_epoch = len(dataset.train) // config.batch_size
        self.total_steps = self.steps_per_epoch * config.epochs
        params = nnx.state(task.model, nnx.Param)
        optimizer = config.build_optimizer().build(params, self.total_steps)
        graphdef, self.state = create_state(task.model, optimizer)
        prepare = functools.partial(normalize, mean=dataset.mean, std=dataset.std)
        flip, pad = _augmentation(config, dataset)
        self.train_step = make_train_step(
            graphdef,
            optimizer,
            smoothing=config.label_smoothing,
            preprocess=lambda x, key: prepare(augment(x, key, flip=flip, pad=pad)),
        )
        self.eval_step = make_eval_step(graphdef, preprocess=prepare)
        self.key = jax.random.key(config.seed)
        self.start = task.start
        self.history: list[dict[str, Any]] = []

    def go(self) -> dict[str, Any]:
        summary_path = self.folder / "summary.json"
        if summary_path.exists():
            print(f"{self.folder} is complete already.")
            return dict(json.loads(summary_path.read_text()))
        self._restore()
        (self.folder / "layers.txt").write_text(f"{self.task.table}\n")
        dataset = self.task.dataset
        train_data = _on_device(dataset.train)
        validation_data = _on_device(dataset.validation)
        began = time.perf_counter()
        with _StopOnSignal() as stop, reporting.Progress(self.total_steps) as progress:
            for epoch in range(int(self.state.step) // self.steps_per_epoch, self.config.epochs):
                self._train_epoch(epoch, train_data, stop, progress)
                self._end_epoch(epoch, validation_data, progress)
                if stop.requested and epoch + 1 < self.config.epochs:
                    raise Interrupted(self._how_to_resume())
        test = self._evaluate(_on_device(dataset.test))
        summary = self._summary(test, time.perf_counter() - began)
        _write(summary_path, json.dumps(summary, indent=2) + "\n")
        reporting.plot_curves(self.history, summary, self.folder / "curves.png")
        return summary

    def _train_epoch(
        self, epoch: int, data: Data, stop: _StopOnSignal, progress: reporting.Progress
    ) -> None:
        order = epoch_order(
            len(self.task.dataset.train), self.config.batch_size, self.config.seed, epoch
        )
        in_flight: collections.deque[jax.Array] = collections.deque()
        first = int(self.state.step) % self.steps_per_epoch
        for i in range(first, self.steps_per_epoch):
            self.state, loss = self.train_step(self.state, *data, jnp.asarray(order[i]), self.key)
            in_flight.append(loss)
            done = epoch * self.steps_per_epoch + i + 1
            if len(in_flight) > _IN_FLIGHT:
                # The loss of a step long dispatched: the device is not kept waiting for it.
                progress.step(done, epoch, float(in_flight.popleft()), self.config.batch_size)
            if stop.requested and i + 1 < self.steps_per_epoch:
                self._save()
                raise Interrupted(self._how_to_resume())

    def _end_epoch(self, epoch: int, validation: Data, progress: reporting.Progress) -> None:
        trained = self.state.metrics.means()
        if not math.isfinite(trained["loss"]):
            raise UserError(
                f"the loss became {trained['loss']} in epoch {epoch + 1}: lower the learning "
                f"rate. The run's last good state is in {self.folder / 'checkpoints'}."
            )
        held_out = self._evaluate(validation)
        line = {
            "epoch": epoch + 1,
            "step": int(self.state.step),
            "train_loss": trained["loss"],
            "train_accuracy": trained["accuracy"],
            "validation_loss": held_out["loss"],
            "validation_accuracy": held_out["accuracy"],
        }
        self.history.append(line)
        self.state = reset_metrics(self.state)
        self._save()
        text = "".join(json.dumps(entry) + "\n" for entry in self.history)
        _write(self.folder / "metrics.jsonl", text)
        reporting.plot_curves(self.history, None, self.folder / "curves.png")
        progress.epoch(line, self.config.epochs)

    def _evaluate(self, data: Data) -> dict[str, float]:
        metrics = Metrics.zero()
        n, batch = data[1].shape[0], self.config.batch_size
        for start in range(0, n, batch):
            indices = np.arange(start, start + batch, dtype=np.int32)
            indices[indices >= n] = -1
            metrics = self.eval_step(self.state, metrics, *data, jnp.asarray(indices))
        return metrics.means()

    def _save(self) -> None:
        """Saves the state, then drops all checkpoints before it."""
        folder = self.folder / "checkpoints"
        path = folder / f"step_{int(self.state.step):08d}"
        if not path.exists():
            save_checkpoint(path, self.state, self._metadata())
        for old in folder.glob("step_*"):
            if old != path:
                shutil.rmtree(old, ignore_errors=True)

    def _metadata(self) -> dict[str, Any]:
        return {
            "experiment": self.kind,
            "config": self.config.to_json(),
            "num_classes": self.task.dataset.num_classes,
            "start": self.start,
            "history": self.history,
        }

    def _restore(self) -> None:
        path = latest_checkpoint(self.folder / "checkpoints")
        if path is None:
            return
        self.state = restore_checkpoint(path, self.state)
        # The history of the checkpoint, not of metrics.jsonl, which may be an epoch ahead.
        metadata = read_metadata(path)
        self.history, self.start = list(metadata["history"]), metadata["start"]
        print(f"resuming {self.folder} after step {int(self.state.step)} of {self.total_steps}")

    def _how_to_resume(self) -> str:
        return (
            f"stopped after step {int(self.state.step)} of {self.total_steps} and saved; "
            f"continue by: python -m experiments.{self.kind} --resume {self.folder}"
        )

    def _summary(self, test: dict[str, float], seconds: float) -> dict[str, Any]:
        last = self.history[-1]
        return {
            "experiment": self.kind,
            "dataset": self.config.dataset,
            "model": self.config.model,
            "width": self.config.width,
            "recipe": self.config.recipe,
            "optimizer": self.config.optimizer,
            "seed": self.config.seed,
            "start": self.start,
            "epochs": self.config.epochs,
            "steps": self.total_steps,
            "parameters": sum(x.size for x in jax.tree.leaves(self.state.params)),
            "train_loss": last["train_loss"],
            "validation_accuracy": last["validation_accuracy"],
            "test_loss": test["loss"],
            "test_accuracy": test["accuracy"],
            "test_images": len(self.task.dataset.test),
            "seconds": round(seconds, 1),
        }


class _StopOnSignal:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step in hand."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> _StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _augmentation(config: RunConfig, dataset: Dataset) -> tuple[bool, int]:
    """Whether to flip and by how much to pad: what was asked, or what suits the data."""
    is_text = dataset.name in ("digits", "mnist5k")
    flip = not is_text if config.flip is None else config.flip
    if config.pad is not None:
        return flip, config.pad
    return flip, 0 if is_text else min(dataset.image_size) // 8


def _on_device(split: Split) -> Data:
    return jnp.asarray(split.images), jnp.asarray(split.labels)


def _write(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def write_config(config: RunConfig, folder: pathlib.Path) -> None:
    """Writes the options to the run's folder, where resuming finds them."""
    _write(folder / "config.json", json.dumps(config.to_json(), indent=2) + "\n")
