"""Where a run's metrics go besides ``metrics.jsonl``: TensorBoard, or Weights & Biases."""

from __future__ import annotations

import pathlib
import uuid
from typing import Any, Protocol

from experiments import distributed
from experiments.data.dataset import import_extra
from experiments.runs.config import RunConfig
from experiments.runs.folders import write_text

_PACKAGES = {"tensorboard": ("tensorboardX", "logging"), "wandb": ("wandb", "wandb")}
"""The package that each kind of log needs, and the extra that installs it."""


class Log(Protocol):
    """Takes metrics."""

    def write(self, line: dict[str, Any]) -> None:
        """Takes a line of ``metrics.jsonl``, or the results of the test at a step."""

    def close(self) -> None:
        """Ends it: what was written is there."""


def check_log(config: RunConfig) -> None:
    """Checks that the package for a run's log is there, before any data are read.

    Raises:
      DataError: it is not; the message names the extra that installs it.
    """
    if config.log is not None:
        import_extra(*_PACKAGES[config.log])


def open_log(config: RunConfig, folder: pathlib.Path, step: int) -> Log:
    """The log of a run, which starts or goes on after ``step`` steps.

    Raises:
      DataError: the package is missing.
      OSError: the folder cannot be written.
    """
    if not distributed.first():
        return NoLog()
    if config.log == "tensorboard":
        return _TensorBoard(folder, step)
    if config.log == "wandb":
        return _WandB(config, folder)
    return NoLog()


class NoLog:
    """Takes metrics and keeps none."""

    def write(self, line: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class _TensorBoard:
    """Event files in the run's folder: ``tensorboard --logdir runs`` shows all runs."""

    def __init__(self, folder: pathlib.Path, step: int):
        writer = import_extra(*_PACKAGES["tensorboard"]).SummaryWriter
        # Of a run that goes on, what an earlier file has of later steps does not count.
        self._writer: Any = writer(str(folder), purge_step=step + 1 if step else None)

    def write(self, line: dict[str, Any]) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of Weights & Biases, which goes on where the run does."""

    def __init__(self, config: RunConfig, folder: pathlib.Path):
        wandb: Any = import_extra(*_PACKAGES["wandb"])
        name = folder / "wandb_id.txt"
        if not name.exists():
            write_text(name, f"{uuid.uuid4().hex}\n")
        self._run = wandb.init(
            project="fqt-jax",
            id=name.read_text().strip(),
            name=folder.resolve().name,
            dir=str(folder),
            config=config.to_json(),
            resume="allow",
        )

    def write(self, line: dict[str, Any]) -> None:
        self._run.log(scalars(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by names in groups.

    Example:
      >>> scalars({"epoch": 1, "step": 9, "train_loss": 0.5, "diagnosis": {"conv/noise": 2.0}})
      {'epoch': 1.0, 'train/loss': 0.5, 'diagnosis/conv/noise': 2.0}
    """
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= {f"{name}/{part}": float(number) for part, number in value.items()}
        elif name != "step":
            found[name.replace("_", "/", 1)] = float(value)
    return found
