"""Runs as a report sees them: read from their folders, grouped over seeds."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.cli import UserError
from experiments.runs.config import RECIPE_PARTS, RunConfig
from experiments.runs.saved_config import up_to_date
from experiments.show.formats import Estimate, Table
from experiments.sweeps.sweep import Group as SweepGroup
from experiments.sweeps.sweep import Store
from fqt_jax.recipe import RECIPES

_NOT_COMPARED = (
    "seed",
    "pretrain_seed",
    "cache",
    "data_dir",
    "diagnose",
    "log",
    "save_minutes",
    "workers",
)
"""Options that make no other experiment of a run."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
      folder: where it is kept.
      config: its options, with what those that were left open became, as far as that is known.
      summary: what it came to; None if it has not ended.
      history: its epochs, as in ``metrics.jsonl``.
    """

    folder: pathlib.Path
    config: dict[str, Any]
    summary: dict[str, Any] | None
    history: list[dict[str, Any]]

    @property
    def task(self) -> str:
        """Data set and model."""
        return f"{self.config['dataset']}, {self.config['model']} x{self.config['width']:g}"

    @property
    def variant(self) -> str:
        """The recipe with the parts that were changed, as sweeps take it."""
        options = {k: v for k, v in self.config.items() if k in ("recipe", *RECIPE_PARTS)}
        return RunConfig(**options).variant.replace("=True", "").replace("=False", "=false")

    def options(self) -> dict[str, str]:
        """The options that make the experiment, as text."""
        rest = {k: v for k, v in self.config.items() if k not in (*_NOT_COMPARED, *RECIPE_PARTS)}
        if rest.get("head_learning_rate") == rest.get("learning_rate"):
            rest["head_learning_rate"] = None  # one rate for all is said once
        return {k: _text(v) for k, v in (rest | {"recipe": self.variant}).items()}


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds.

    Attributes:
      task: data set and model.
      label: what tells the group from the others of its task.
      runs: one or more.
    """

    task: str
    label: str
    runs: tuple[Run, ...]

    @property
    def ended(self) -> list[Run]:
        """The runs that came to their end."""
        return [run for run in self.runs if run.summary is not None]

    def estimate(self, name: str, factor: float = 1.0) -> Estimate:
        """Mean and deviation of a number of the summaries."""
        values = [run.summary[name] for run in self.runs if run.summary is not None]
        return Estimate.of([factor * value for value in values if value is not None])


@dataclasses.dataclass(frozen=True)
class Found:
    """What some folders hold: runs, the tables of sweeps, and what is wrong with other runs."""

    runs: list[Run]
    tables: list[Table]
    damaged: list[str] = dataclasses.field(default_factory=list)


def read(folders: Sequence[pathlib.Path]) -> Found:
    """Reads runs and sweeps from folders, or from all folders in them.

    Of a sweep that wrote its results, the runs at the chosen learning rates count. A run with a
    damaged file is left out, and named.

    Raises:
      UserError: a folder does not exist or holds no run; all runs are damaged, or the results of a
        sweep.
    """
    damaged: dict[pathlib.Path, str] = {}
    runs: dict[pathlib.Path, Run] = {}
    tables: list[Table] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder of runs: it does not exist.")
        chosen, found = _sweeps(folder)
        tables += found
        inside = [path.parent for path in sorted(folder.rglob("config.json"))]
        swept = [root for root in chosen if chosen[root]]
        for path in inside:
            root = next((root for root in swept if path.is_relative_to(root / "cells")), None)
            if root is not None and path not in chosen[root]:
                continue
            try:
                runs[path.resolve()] = _run(path)
            except UserError as error:
                damaged[path.resolve()] = str(error)
        if not found and not inside:
            raise UserError(f"{folder} holds no run: there is no config.json in it.")
    if damaged and not runs and not tables:
        raise UserError(" ".join(damaged.values()))
    return Found(list(runs.values()), tables, list(damaged.values()))


def _sweeps(folder: pathlib.Path) -> tuple[dict[pathlib.Path, set[pathlib.Path]], list[Table]]:
    """For each sweep in a folder, the runs that count; and their tables."""
    chosen: dict[pathlib.Path, set[pathlib.Path]] = {}
    tables = []
    for path in sorted(folder.rglob("results.json")):
        values = _json(path)
        try:
            store, cells = Store(path.parent), set()
            for entry in values["groups"]:
                group = SweepGroup.from_json(entry)
                rate = entry["rate"] if group.rates else None
                cells |= {store.folder(group.cell(seed, rate)) for seed in group.seeds}
            tables += [Table(**table) for table in values["tables"]]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged or not of a sweep: {error}") from None
        chosen[path.parent] = cells
    return chosen, tables


def _run(folder: pathlib.Path) -> Run:
    metrics, summary = folder / "metrics.jsonl", folder / "summary.json"
    resolved = folder / "resolved.json"
    try:
        text = metrics.read_text() if metrics.exists() else ""
        history = [json.loads(line) for line in text.splitlines()]
    except ValueError:
        raise UserError(f"{metrics} is damaged.") from None
    config, came_to = _json(folder / "config.json"), _json(summary) if summary.exists() else None
    became = _json(resolved) if resolved.exists() else (came_to or {}).get("resolved", {})
    try:
        run = Run(folder, {**up_to_date(config), **became}, came_to, history)
        run.options(), run.task
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{folder / 'config.json'} is damaged or no run's: {error}") from None
    return run


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged.") from None


def differing(runs: Iterable[Run]) -> list[str]:
    """Names of the options in which some runs differ."""
    options = [run.options() for run in runs]
    names = dict.fromkeys(name for own in options for name in own)
    return [name for name in names if len({own.get(name) for own in options}) > 1]


def group(runs: Sequence[Run]) -> list[Group]:
    """Groups runs over their seeds, task by task; recipes in their order, baselines first."""
    order = list(RECIPES)
    runs = sorted(runs, key=lambda run: order.index(run.config["recipe"]))
    tasks: dict[str, list[Run]] = {}
    for run in runs:
        tasks.setdefault(run.task, []).append(run)
    groups = []
    for task, own in tasks.items():
        names = [name for name in differing(own) if name not in ("dataset", "model", "width")]
        by_label: dict[str, list[Run]] = {}
        for run in own:
            by_label.setdefault(_label(run, names), []).append(run)
        groups += [Group(task, label, tuple(found)) for label, found in by_label.items()]
    return groups


def _label(run: Run, names: list[str]) -> str:
    options = run.options()
    parts = [options["recipe"]]
    for name in names:
        if name in ("recipe", "experiment"):
            continue
        value = options.get(name, "-")
        parts.append(value if name == "optimizer" else f"{name}={value}")
    return ", ".join(parts)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
