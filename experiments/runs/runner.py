"""One training run in its folder: steps, epochs, checkpoints, resume, summary."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import time
from collections.abc import Hashable
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from experiments import process
from experiments.cli import UserError
from experiments.data.schedule import Part
from experiments.distributed import Agreement, several, wait_for_all
from experiments.process import Interrupted, StopOnSignal
from experiments.runs import reporting
from experiments.runs.batches import Batches, batches
from experiments.runs.checkpoints import RunCheckpoints, check_nothing_is_lost
from experiments.runs.config import RunConfig
from experiments.runs.devices import mesh_of, placed
from experiments.runs.diagnosis import Diagnosis
from experiments.runs.divergence import origin
from experiments.runs.folders import write_json, write_text
from experiments.runs.kinds import kind_of
from experiments.runs.logs import Log, NoLog, open_log
from experiments.runs.steps import (
    Step,
    build_eval_step,
    build_train_step,
    evaluate,
)
from experiments.runs.stopping import best_epoch, reason_to_stop
from experiments.runs.summaries import read_summary, summarize
from experiments.runs.tasks import Task, resolved
from fqt_jax.averaging import averaged_parameters
from fqt_jax.batches import take
from fqt_jax.checkpoints import nonfinite_arrays, read_metadata, restore_checkpoint
from fqt_jax.exchange import Signs
from fqt_jax.training import TrainState, create_state, place_state, reset_metrics

_IN_FLIGHT = 4
"""Steps dispatched ahead of the device, so that it never waits, nor the user after Ctrl-C."""


class Diverged(UserError):
    """The loss, or a part of the state, is not a finite number any more."""


class Steps(NamedTuple):
    """An optimizer with its compiled steps: the same for runs that differ in seed or rates."""

    optimizer: optax.GradientTransformation
    train: Step
    evaluate: Step


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

    Writes to the folder at the start ``layers.txt``, the table of the conversion, and
    ``resolved.json``, what options that were left open became; after each epoch a checkpoint, a
    line of ``metrics.jsonl``, and the picture of the curves, with ``diagnose`` also
    ``diagnosis.png``; at the end ``summary.json``, with the accuracy on the test split, which
    nothing is chosen by. With ``patience`` the run may stop early, and what is tested is its best
    epoch.

    The last two checkpoints are kept, and that of the best epoch. A state that is not finite is
    never saved. Where the last checkpoint is damaged, the run goes on from the one before, and says
    so.

    Args:
      config: the options.
      task: the data and the model.
      folder: the run's folder; it exists.
      kind: name of the experiment, for messages.
      shared: the steps that other runs of this process compiled; this run's are added.
      save_seconds: least time between checkpoints; 0 for one each epoch. With it, a run that
        diverges does not look for the layer where that began.

    Returns:
      The summary.

    Raises:
      Interrupted: a signal stopped the run; its state is saved.
      Diverged: the loss, or a part of the state, is not a finite number any more.
      UserError: there are fewer samples than one batch; or the folder has no checkpoint that is
        whole although one was saved, or a damaged summary.
      CheckpointError: a checkpoint cannot be saved, or is of another model.
      OSError: another file cannot be written.
    """
    run = _Run(config, task, folder, kind, {} if shared is None else shared, save_seconds)
    try:
        return run.go()
    except OSError as error:
        if error.filename is None:  # a disk that is full while a file is written
            error.filename = str(folder)
        raise
    finally:
        run.log.close()


def _steps(
    config: RunConfig, task: Task, graphdef: Any, total_steps: int, mesh: Mesh | None
) -> Steps:
    dataset = task.dataset
    exchange, options = config.build_exchange(total_steps), config.build_optimizer()
    if isinstance(exchange, Signs):
        options = dataclasses.replace(options, second_moment_steps=exchange.warmup)
    optimizer = options.build(nnx.state(task.model, nnx.Param), total_steps)
    train_step = build_train_step(
        config, dataset, graphdef, optimizer, augments=True, mesh=mesh, exchange=exchange
    )
    return Steps(optimizer, train_step, build_eval_step(dataset, graphdef, mesh))


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
        self.mesh = mesh_of(config)
        self.agreement = Agreement(_IN_FLIGHT)
        dataset = task.dataset
        self.of = kind_of(dataset)
        config.check_batch(len(dataset.train))
        self.steps_per_epoch = len(dataset.train) // config.batch_size
        self.total_steps = self.steps_per_epoch * config.epochs
        self.exchange = config.build_exchange(self.total_steps)
        graphdef = nnx.graphdef(task.model)
        program = (graphdef, config.compiled())
        if program not in shared:
            shared[program] = _steps(config, task, graphdef, self.total_steps, self.mesh)
        self.steps = shared[program]
        self.graphdef = graphdef
        self.state = state = self._beginning()
        self.key = placed(jax.random.key(config.seed), self.mesh)
        self.start = task.start
        self.history: list[dict[str, Any]] = []
        self.log: Log = NoLog()
        self.step_seconds: list[float] = []
        self.checkpoints = RunCheckpoints(folder / "checkpoints")
        self.saved_at = time.perf_counter()
        self.compiled = False
        self.diagnosis = Diagnosis(config, dataset, graphdef, state) if config.diagnose else None

    def _beginning(self) -> TrainState:
        _, state = create_state(
            self.task.model,
            self.steps.optimizer,
            self.of.metrics,
            exchange=self.exchange,
            mesh=self.mesh,
        )
        opt_state = self.config.build_optimizer().set_rates(state.opt_state)
        return self._placed(dataclasses.replace(state, opt_state=opt_state))

    def _placed(self, state: TrainState) -> TrainState:
        return state if self.mesh is None else place_state(state, self.mesh)

    def go(self) -> dict[str, Any]:
        wait_for_all("the run's folder")
        summary_path = self.folder / "summary.json"
        if summary_path.exists():
            summary = read_summary(summary_path)
            print(f"{self.folder} is complete already.")
            return summary
        self._restore()
        self.log = open_log(self.config, self.folder, self._steps_told())
        write_text(self.folder / "layers.txt", f"{self.task.table}\n")
        write_json(self.folder / "resolved.json", resolved(self.config, self.task.dataset))
        began = time.perf_counter()
        with contextlib.closing(batches(self.config, self.task.dataset, self.mesh)) as made:
            with StopOnSignal() as stop, self._progress() as progress:
                first = int(self.state.step) // self.steps_per_epoch
                for epoch in range(first, self.config.epochs):
                    if reason_to_stop(self.history, self.config.patience):
                        break
                    self._train_epoch(epoch, made, stop, progress)
                    self._end_epoch(epoch, made, progress)
                    if self.agreement.ask_now(stop.requested, False)[0]:
                        self._save_and_stop(epoch)
            stopped = reason_to_stop(self.history, self.config.patience)
            if len(self.history) == self.config.epochs:
                stopped = None
            elif stopped:
                print(f"stopped early, {stopped}")
            steps = int(self.state.step)
            chosen = self._choose()
            test = self._evaluate(made, "test", self.config.epochs)
        summary = summarize(
            self.config,
            self.task,
            self.state.params,
            experiment=self.kind,
            start=self.start,
            steps=steps,
            chosen=chosen,
            stopped=stopped,
            test=test,
            step_seconds=self.step_seconds,
            wait_fraction=progress.wait_fraction,
            seconds=time.perf_counter() - began,
        )
        write_json(summary_path, summary)
        told = {f"test_{name}": value for name, value in test.items()}
        self.log.write({"step": steps, **told})
        reporting.plot_curves(self.history, summary, self.folder / "curves.png")
        return summary

    def _progress(self) -> reporting.Progress:
        return reporting.Progress(self.total_steps, self.of.samples)

    def _steps_told(self) -> int:
        """The steps of the epochs that are in the history."""
        return int(self.history[-1]["step"]) if self.history else 0

    def _choose(self) -> dict[str, Any]:
        """The epoch that is tested, whose state is then the run's: the last, or the best."""
        if self.config.patience is None:
            return self.history[-1]
        best = best_epoch(self.history)
        if best["step"] != int(self.state.step):
            self.state = self._read(self.checkpoints.at(best["step"]), self.state)
        return best

    def _read(self, path: pathlib.Path, state: TrainState) -> TrainState:
        """A saved state, where the states of this run lie."""
        if not isinstance(self.exchange, Signs) or self.mesh is None:
            return self._placed(restore_checkpoint(path, state))
        # What each device keeps is of as many as there were when it was saved.
        kept = self.exchange.init(state.params, read_metadata(path)["devices"])
        state = restore_checkpoint(path, dataclasses.replace(state, exchange=kept))
        kept = self.exchange.moved(state.exchange, state.params, self.mesh.size)
        same = kept.error.shape == state.exchange.error.shape
        return self._placed(state if same else dataclasses.replace(state, exchange=kept))

    def _train_epoch(
        self, epoch: int, made: Batches, stop: StopOnSignal, progress: reporting.Progress
    ) -> None:
        in_flight: collections.deque[tuple[int, jax.Array]] = collections.deque()
        finished: list[float] = []

        def wait() -> None:
            step, loss = in_flight.popleft()
            value = float(loss)
            finished.append(time.perf_counter())
            if not math.isfinite(value):
                where = self._where(step, made)
                raise self._diverged(f"the loss became {value} at step {step}{where}", epoch)
            progress.step(step, epoch, value, self.config.batch_size)

        progress.count_from_here()
        first = int(self.state.step) % self.steps_per_epoch
        ahead = made.train(epoch, first)
        for i in range(first, self.steps_per_epoch):
            while in_flight and not made.ready():
                wait()  # the device is busy: only what comes after that is waiting for data
            with progress.waiting():
                batch = next(ahead)
            self.state, loss = self.steps.train(self.state, *batch, self.key)
            stop.defer()  # before its first step a run has nothing to save
            in_flight.append((epoch * self.steps_per_epoch + i + 1, loss))
            if not self.compiled:
                wait()
                self.compiled = True
                progress.count_from_here()
            elif len(in_flight) > _IN_FLIGHT:
                # The loss of a step long dispatched: the device is not kept waiting for it.
                wait()
            stopping, saving = self.agreement.ask(
                stop.requested, self._minutes_are_over(), after=loss
            )
            if i + 1 < self.steps_per_epoch and (stopping or saving):
                while in_flight:
                    wait()
                if stopping:
                    self._save_and_stop(epoch)
                self._check_finite(epoch)
                self._save()
        while in_flight:
            wait()
        progress.count_to_here()
        self.step_seconds += np.diff(finished).tolist()

    def _end_epoch(self, epoch: int, made: Batches, progress: reporting.Progress) -> None:
        self._check_finite(epoch)
        trained = self.state.metrics.means()
        held_out = self._evaluate(made, "validation", epoch)
        line: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": int(self.state.step),
            **{f"train_{name}": value for name, value in trained.items()},
            **{f"validation_{name}": value for name, value in held_out.items()},
        }
        if self.config.test_each_epoch:
            found = self._evaluate(made, "test", epoch)
            line |= {f"test_{name}": found[name] for name in self.of.metrics}
        if self.diagnosis:
            line["diagnosis"] = self.diagnosis.after_epoch(self.state)
        self.history.append(line)
        self.state = reset_metrics(self.state)
        due = time.perf_counter() - self.saved_at >= self.save_seconds
        if self.config.patience is not None:
            due |= best_epoch(self.history) is line  # what is to be tested has to be there
        if due:
            self._save()
        self._write_metrics()
        self.log.write(line)
        if due:
            reporting.plot_curves(self.history, None, self.folder / "curves.png")
        progress.epoch(line, self.config.epochs)
        if self.diagnosis:
            self.diagnosis.report(self.history, self.folder)

    def _evaluate(self, made: Batches, part: Part, epoch: int) -> dict[str, float]:
        state = dataclasses.replace(self.state, params=averaged_parameters(self.state))
        return evaluate(self.steps.evaluate, state, made.evaluate(part, epoch))

    def _minutes_are_over(self) -> bool:
        minutes = self.config.save_minutes
        return minutes is not None and time.perf_counter() - self.saved_at >= 60 * minutes

    def _save(self) -> None:
        best = best_epoch(self.history)["step"] if self.history else None
        self.checkpoints.save(self.state, self._metadata(), best=best)
        self.saved_at = time.perf_counter()

    def _save_and_stop(self, epoch: int) -> NoReturn:
        self._check_finite(epoch)
        self._save()
        raise Interrupted(self._how_to_resume())

    def _write_metrics(self) -> None:
        text = "".join(json.dumps(entry) + "\n" for entry in self.history)
        write_text(self.folder / "metrics.jsonl", text)

    def _check_finite(self, epoch: int) -> None:
        """The losses are those before each update; this sees what the last one has done."""
        wrong = nonfinite_arrays(self.state)
        if self.agreement.ask_now(bool(wrong), False)[0]:
            arrays = len(jax.tree.leaves(self.state))
            wrong = wrong or ["those of another process"]
            raise self._diverged(
                f"{len(wrong)} of {arrays} arrays are not finite after step "
                f"{int(self.state.step)}, {wrong[0]} for one",
                epoch,
            )

    def _where(self, step: int, made: Batches) -> str:
        """Where it began that a step's loss is not finite: the steps before it are taken again."""
        if self.save_seconds or several():
            return ""  # one run of many, expected at the highest rates; or one of many processes
        path, _ = self.checkpoints.newest()
        state = self._beginning()
        state = self._read(path, state) if path else state
        print(f"taking the steps from {int(state.step) + 1} again, to see where that began")
        epoch, first = divmod(int(state.step), self.steps_per_epoch)
        steps = itertools.chain.from_iterable(
            made.train(each, first if each == epoch else 0)
            for each in range(epoch, self.config.epochs)
        )
        for given in itertools.islice(steps, step - 1 - int(state.step)):
            state, _ = self.steps.train(state, *given, self.key)
        given = next(steps)
        # The data and which of them, or the images themselves.
        batch = take(*given) if len(given) == 2 else given[0]
        preprocess = self.of.training(self.config, self.task.dataset)
        if preprocess is not None:
            batch = preprocess(batch, jax.random.fold_in(self.key, step - 1))
        return f": {origin(self.graphdef, state, batch[self.of.inputs])}"

    def _diverged(self, what: str, epoch: int) -> Diverged:
        whole, _ = self.checkpoints.newest()
        left = f"last good checkpoint is {whole}" if whole else "first checkpoint was yet to come"
        return Diverged(f"{what}, in epoch {epoch + 1}: lower the learning rate. The run's {left}.")

    def _metadata(self) -> dict[str, Any]:
        return {
            "experiment": self.kind,
            "config": self.config.to_json(),
            "devices": 1 if self.mesh is None else self.mesh.size,
            "num_classes": self.task.dataset.num_classes,
            "start": self.start,
            "history": self.history,
            "diagnosis": self.diagnosis and self.diagnosis.to_json(),
        }

    def _restore(self) -> None:
        path, wrong = self.checkpoints.newest()
        if path is None:
            epochs_are_saved = not self.save_seconds
            check_nothing_is_lost(self.folder, wrong, epochs_are_saved=epochs_are_saved)
            print(f"starting {self.folder} at step 0 of {self.total_steps}")
            return
        for message in wrong:
            print(f"warning: {message}")
        self.state = self._read(path, self.state)
        metadata = read_metadata(path)
        self.history, self.start = list(metadata["history"]), metadata["start"]
        if self.diagnosis:
            self.diagnosis.restore(metadata["diagnosis"])
        # A checkpoint is written before the epoch's line, and its history is the one that counts.
        self._write_metrics()
        step = int(self.state.step)
        print(f"resuming {self.folder} from {path.name}, after step {step} of {self.total_steps}")

    def _how_to_resume(self) -> str:
        return (
            f"stopped after step {int(self.state.step)} of {self.total_steps} and saved; "
            f"continue by: {process.command(self.kind)} --resume {self.folder}"
        )
