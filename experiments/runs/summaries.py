"""What a run came to, in its ``summary.json``."""

from __future__ import annotations

import json
import pathlib
import statistics
from typing import Any

import jax

from experiments.cli import UserError
from experiments.runs.config import RunConfig
from experiments.runs.kinds import kind_of
from experiments.runs.tasks import Task, resolved


def summarize(
    config: RunConfig,
    task: Task,
    params: Any,
    *,
    experiment: str,
    start: str,
    steps: int,
    chosen: dict[str, Any],
    stopped: str | None,
    test: dict[str, float],
    step_seconds: list[float],
    wait_fraction: float,
    seconds: float,
) -> dict[str, Any]:
    """The summary of a run that is complete.

    Args:
      config: its options.
      task: its data and model.
      params: its trained parameters.
      experiment: name of the experiment.
      start: what it started from.
      steps: how many steps it took.
      chosen: the line of ``metrics.jsonl`` of the epoch that was tested: the last one, or with
        ``patience`` the best.
      stopped: why it stopped before its last epoch, if it did.
      test: loss and metrics on the test split.
      step_seconds: how long its steps took each.
      wait_fraction: the share of the time of training in which the device had no batch.
      seconds: how long all of it took.
    """
    gradient = config.build_recipe().gradient
    return {
        "experiment": experiment,
        "dataset": config.dataset,
        "model": config.model,
        "width": config.width,
        "recipe": config.recipe,
        "variant": config.variant,
        "gradient_bits": 32 if gradient is None else gradient.bits_per_entry,
        "optimizer": config.optimizer,
        "learning_rate": config.build_optimizer().rates()[0],
        "seed": config.seed,
        "start": start,
        "epochs": config.epochs,
        "stopped": stopped,
        "resolved": resolved(config, task.dataset),
        "tested_epoch": chosen["epoch"],
        "checkpoint": f"step_{chosen['step']:08d}",
        "steps": steps,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "train_loss": chosen["train_loss"],
        **{f"validation_{name}": chosen[f"validation_{name}"] for name in test},
        **{f"test_{name}": value for name, value in test.items()},
        "test_images": len(task.dataset.test),
        "samples": kind_of(task.dataset).samples,
        "step_ms": _median_ms(step_seconds),
        "wait_fraction": round(wait_fraction, 4),
        "seconds": round(seconds, 1),
    }


def read_summary(path: pathlib.Path) -> dict[str, Any]:
    """Reads a summary that :func:`summarize` made.

    Raises:
      UserError: it is damaged.
    """
    try:
        summary = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        what = str(error)
    else:
        absent = sorted(_NAMES - summary.keys())
        if not absent:
            return summary
        what = f"it has no {absent[0]}"
    raise UserError(
        f"{path} is damaged: {what}. Remove it and resume: then the run's last checkpoint is "
        "evaluated again."
    )


_NAMES = {  # all but what summaries of earlier versions lack
    "experiment",
    "dataset",
    "model",
    "width",
    "recipe",
    "variant",
    "gradient_bits",
    "optimizer",
    "learning_rate",
    "seed",
    "start",
    "epochs",
    "steps",
    "parameters",
    "train_loss",
    "validation_loss",
    "validation_accuracy",
    "test_loss",
    "test_accuracy",
    "test_images",
    "step_ms",
    "seconds",
}


def _median_ms(seconds: list[float]) -> float | None:
    """Median in milliseconds; None of nothing, in runs of one step an epoch."""
    return round(1000 * statistics.median(seconds), 3) if seconds else None
