"""One training run in its folder: steps, epochs, checkpoints, resume, summary."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import reporting
from experiments.cli import UserError
from experiments.config import RunConfig
from experiments.data import Split, epoch_order
from experiments.data.augment import augment, normalize
from experiments.diagnosis import Diagnosis
from experiments.folders import write_json, write_text
from experiments.process import Interrupted, StopOnSignal
from experiments.tasks import Task, augmentation
from fqt_jax.checkpoints import (
    latest_checkpoint,
    read_metadata,
    restore_checkpoint,
    save_checkpoint,
)
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


class Diverged(UserError):
    """The loss is not a number any more."""


class Steps(NamedTuple):
    """An optimizer with its compiled steps: the same for runs that differ in seed or rates."""

    optimizer: optax.GradientTransformation
    train: Callable[..., Any]
    evaluate: Callable[..., Metrics]


SharedSteps = dict[Hashable, Steps]
"""What was compiled so far, by all that decides it. Most of a short run is compilation."""


def train(
    config: RunConfig,
    task: Task,
    folder: pathlib.Path,
    kind: str,
    *,
    shared: SharedSteps | None = None,
    save_seconds: float = 0,
) -> dict[str, Any]:
    """Trains, from the start or from the folder's last checkpoint, to the end.

    Writes to the folder after each epoch: a line of ``metrics.jsonl``, a checkpoint, and the
    picture of the curves, with ``diagnose`` also ``diagnosis.png``; at the end ``summary.json``,
    with the accuracy on the test split, which nothing before has looked at.

    Args:
      config: the options.
      task: the data and the model.
      folder: the run's folder; it exists.
      kind: name of the experiment, for messages.
      shared: the steps that other runs of this process compiled; this run's are added.
      save_seconds: least time between checkpoints; 0 for one each epoch.

    Returns:
      The summary.

    Raises:
      Interrupted: a signal stopped the run; its state is saved.
      Diverged: the loss is not a number any more.
      UserError: there are fewer images than one batch.
    """
    return _Run(config, task, folder, kind, {} if shared is None else shared, save_seconds).go()


def _steps(config: RunConfig, task: Task, graphdef: Any, total_steps: int) -> Steps:
    dataset = task.dataset
    optimizer = config.build_optimizer().build(nnx.state(task.model, nnx.Param), total_steps)
    prepare = functools.partial(normalize, mean=dataset.mean, std=dataset.std)
    flip, pad = augmentation(config, dataset)
    train_step = make_train_step(
        graphdef,
        optimizer,
        smoothing=config.label_smoothing,
        preprocess=lambda x, key: prepare(augment(x, key, flip=flip, pad=pad)),
        one_draw=config.build_one_draw(),
        stratify=config.stratify,
    )
    return Steps(optimizer, train_step, make_eval_step(graphdef, preprocess=prepare))


class _Run:
    def __init__(
        self,
        config: RunConfig,
        task: Task,
        folder: pathlib.Path,
        kind: str,
        shared: SharedSteps,
        save_seconds: float,
    ):
        self.config, self.task, self.folder, self.kind = config, task, folder, kind
        self.save_seconds = save_seconds
        dataset = task.dataset
        if config.batch_size > len(dataset.train):
            raise UserError(
                f"batch_size is {config.batch_size}, but {config.dataset} has only "
                f"{len(dataset.train)} training images."
            )
        self.steps_per_epoch = len(dataset.train) // config.batch_size
        self.total_steps = self.steps_per_epoch * config.epochs
        graphdef = nnx.graphdef(task.model)
        program = (graphdef, config.compiled())
        if program not in shared:
            shared[program] = _steps(config, task, graphdef, self.total_steps)
        self.steps = shared[program]
        _, state = create_state(task.model, self.steps.optimizer)
        opt_state = config.build_optimizer().set_rates(state.opt_state)
        self.state = dataclasses.replace(state, opt_state=opt_state)
        self.key = jax.random.key(config.seed)
        self.start = task.start
        self.history: list[dict[str, Any]] = []
        self.step_seconds: list[float] = []
        self.saved_at = time.perf_counter()
        self.diagnosis = Diagnosis(config, dataset, graphdef, state) if config.diagnose else None

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
        with StopOnSignal() as stop, reporting.Progress(self.total_steps) as progress:
            for epoch in range(int(self.state.step) // self.steps_per_epoch, self.config.epochs):
                self._train_epoch(epoch, train_data, stop, progress)
                self._end_epoch(epoch, validation_data, progress)
                if stop.requested:
                    self._save()
                    raise Interrupted(self._how_to_resume())
        test = self._evaluate(_on_device(dataset.test))
        summary = self._summary(test, time.perf_counter() - began)
        write_json(summary_path, summary)
        reporting.plot_curves(self.history, summary, self.folder / "curves.png")
        return summary

    def _train_epoch(
        self, epoch: int, data: Data, stop: StopOnSignal, progress: reporting.Progress
    ) -> None:
        order = epoch_order(
            len(self.task.dataset.train), self.config.batch_size, self.config.seed, epoch
        )
        in_flight: collections.deque[jax.Array] = collections.deque()
        finished: list[float] = []

        def wait() -> float:
            loss = float(in_flight.popleft())
            finished.append(time.perf_counter())
            return loss

        first = int(self.state.step) % self.steps_per_epoch
        for i in range(first, self.steps_per_epoch):
            self.state, loss = self.steps.train(self.state, *data, jnp.asarray(order[i]), self.key)
            stop.defer()  # before its first step a run has nothing to save
            in_flight.append(loss)
            done = epoch * self.steps_per_epoch + i + 1
            if len(in_flight) > _IN_FLIGHT:
                # The loss of a step long dispatched: the device is not kept waiting for it.
                progress.step(done, epoch, wait(), self.config.batch_size)
            if stop.requested and i + 1 < self.steps_per_epoch:
                self._save()
                raise Interrupted(self._how_to_resume())
        while in_flight:
            wait()
        self.step_seconds += np.diff(finished).tolist()

    def _end_epoch(self, epoch: int, validation: Data, progress: reporting.Progress) -> None:
        trained = self.state.metrics.means()
        if not math.isfinite(trained["loss"]):
            folder = self.folder / "checkpoints"
            last = latest_checkpoint(folder) and f" The run's last good state is in {folder}."
            raise Diverged(
                f"the loss became {trained['loss']} in epoch {epoch + 1}: lower the learning "
                f"rate.{last or ''}"
            )
        held_out = self._evaluate(validation)
        line: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": int(self.state.step),
            "train_loss": trained["loss"],
            "train_accuracy": trained["accuracy"],
            "validation_loss": held_out["loss"],
            "validation_accuracy": held_out["accuracy"],
        }
        if self.diagnosis:
            line["diagnosis"] = self.diagnosis.after_epoch(self.state)
        self.history.append(line)
        self.state = reset_metrics(self.state)
        text = "".join(json.dumps(entry) + "\n" for entry in self.history)
        write_text(self.folder / "metrics.jsonl", text)
        if time.perf_counter() - self.saved_at >= self.save_seconds:
            self._save()
            reporting.plot_curves(self.history, None, self.folder / "curves.png")
        progress.epoch(line, self.config.epochs)
        if self.diagnosis:
            self.diagnosis.report(self.history, self.folder)

    def _evaluate(self, data: Data) -> dict[str, float]:
        metrics = Metrics.zero()
        n, batch = data[1].shape[0], self.config.batch_size
        for start in range(0, n, batch):
            indices = np.arange(start, start + batch, dtype=np.int32)
            indices[indices >= n] = -1
            metrics = self.steps.evaluate(self.state, metrics, *data, jnp.asarray(indices))
        return metrics.means()

    def _save(self) -> None:
        """Saves the state, then drops all checkpoints before it."""
        self.saved_at = time.perf_counter()
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
            "diagnosis": self.diagnosis and self.diagnosis.to_json(),
        }

    def _restore(self) -> None:
        path = latest_checkpoint(self.folder / "checkpoints")
        if path is None:
            return
        self.state = restore_checkpoint(path, self.state)
        # The history of the checkpoint, not of metrics.jsonl, which may be an epoch ahead.
        metadata = read_metadata(path)
        self.history, self.start = list(metadata["history"]), metadata["start"]
        if self.diagnosis:
            self.diagnosis.restore(metadata["diagnosis"])
        print(f"resuming {self.folder} after step {int(self.state.step)} of {self.total_steps}")

    def _how_to_resume(self) -> str:
        return (
            f"stopped after step {int(self.state.step)} of {self.total_steps} and saved; "
            f"continue by: python -m experiments.{self.kind} --resume {self.folder}"
        )

    def _summary(self, test: dict[str, float], seconds: float) -> dict[str, Any]:
        last = self.history[-1]
        gradient = self.config.build_recipe().gradient
        return {
            "experiment": self.kind,
            "dataset": self.config.dataset,
            "model": self.config.model,
            "width": self.config.width,
            "recipe": self.config.recipe,
            "variant": self.config.variant,
            "gradient_bits": 32 if gradient is None else gradient.bits_per_entry,
            "optimizer": self.config.optimizer,
            "learning_rate": self.config.build_optimizer().rates()[0],
            "seed": self.config.seed,
            "start": self.start,
            "epochs": self.config.epochs,
            "steps": self.total_steps,
            "parameters": sum(x.size for x in jax.tree.leaves(self.state.params)),
            "train_loss": last["train_loss"],
            "validation_loss": last["validation_loss"],
            "validation_accuracy": last["validation_accuracy"],
            "test_loss": test["loss"],
            "test_accuracy": test["accuracy"],
            "test_images": len(self.task.dataset.test),
            "step_ms": _median_ms(self.step_seconds),
            "seconds": round(seconds, 1),
        }


def _median_ms(seconds: list[float]) -> float | None:
    """Median in milliseconds; None of nothing, in runs of one step an epoch."""
    return round(1000 * statistics.median(seconds), 3) if seconds else None


def _on_device(split: Split) -> Data:
    return jnp.asarray(split.images), jnp.asarray(split.labels)
