"""Pretraining: its options."""

from __future__ import annotations

import contextlib
import dataclasses

from experiments.runs import folders, reporting, runner, tasks
from experiments.runs.config import RunConfig
from experiments.runs.saved_config import read_config


@dataclasses.dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Pretraining: quantization-aware, from random values."""

    dataset: str = "mnist5k"
    """Data set, as for experiments.finetune."""
    recipe: str = "qat"
    """Recipe: full_precision, qat, psq1, fqt1 or fqt1_plus. The next eleven change parts of it."""
    learning_rate: float | None = 2e-3
    """Learning rate."""
    epochs: int = 8
    """Passes over the training data."""


def main(config: PretrainConfig) -> None:
    """Runs the experiment."""
    with contextlib.ExitStack() as held:
        folder = config.resume
        if folder is not None:
            config = read_config(config, folder)
            held.enter_context(folders.continuing(folder, "pretrain"))
        else:
            folders.check_can_start(config)
        tasks.check_freeze(config)
        dataset = tasks.load_dataset(config)
        config.check_batch(len(dataset.train))
        task = tasks.build_task(config, dataset, None)
        if folder is None:
            folder = held.enter_context(folders.starting(config, "pretrain"))
        summary = runner.train(config, task, folder, "pretrain")
        reporting.print_summary(summary, folder)
