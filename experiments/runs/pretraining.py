"""Pretraining: its options, and the newest run of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib

from experiments.cli import UserError
from experiments.runs import devices, folders, logs, reporting, runner, tasks
from experiments.runs.config import RunConfig
from experiments.runs.saved_config import config_from_json, read_config
from experiments.runs.summaries import read_summary

RUNS = pathlib.Path("runs")
"""Where runs are that were given no folder."""
_OF_NO_ACCOUNT = ("data_dir", "diagnose", "test_each_epoch", "log", "save_minutes", "workers")
"""Options that make no difference to what is trained."""


@dataclasses.dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Pretraining: quantization-aware, from random values."""

    dataset: str = "mnist5k"
    """Data set, as for experiments.finetune."""
    recipe: str = "qat"
    """Recipe: full_precision, qat, psq1, fqt1 or fqt1_plus, or qat_activations, with float weights,
    the first of two steps. The next eleven change parts of it."""
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
            devices.mesh_of(config)  # a check, before data are read
            folders.check_can_start(config)
        logs.check_log(config)
        tasks.check_freeze(config)
        dataset = tasks.load_dataset(config)
        config.check_batch(len(dataset.train))
        task = tasks.build_task(config, dataset, None)
        if folder is None:
            folder = held.enter_context(folders.starting(config, "pretrain"))
        summary = runner.train(config, task, folder, "pretrain")
        reporting.print_summary(summary, folder)


def newest_pretraining(options: PretrainConfig) -> tuple[pathlib.Path | None, str]:
    """The newest run of experiments.pretrain under runs/, and why it is not the one of ``options``.

    It is that one if all that decides its numbers is the same: then so is its model, bit for bit.
    """
    found = [path for path in RUNS.glob("*/config.json") if _is_pretraining(path.parent)]
    if not found:
        return None, ""
    folder = max(found, key=lambda path: (path.stat().st_mtime, path)).parent
    try:
        saved = config_from_json(PretrainConfig, json.loads((folder / "config.json").read_text()))
        values = saved.to_json()
        if not folders.finished(folder):
            return folder, "it is not complete"
        if values["image_size"] is None:
            values |= {
                "image_size": read_summary(folder / "summary.json")["resolved"].get("image_size")
            }
    except (ValueError, TypeError, AttributeError, KeyError, UserError):
        return folder, "it is damaged or of another version"
    wanted = options.to_json()
    differing = [
        f"{name} is {values[name]}, not {wanted[name]}"
        for name in wanted
        if name not in _OF_NO_ACCOUNT and values[name] != wanted[name]
    ]
    return folder, ", ".join(differing)


def _is_pretraining(folder: pathlib.Path) -> bool:
    if folder.name.startswith("pretrain-"):
        return True
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        summary = json.loads((folder / "summary.json").read_text())
        return bool(summary["experiment"] == "pretrain")
    return False
