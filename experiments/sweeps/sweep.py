"""Sweeps: groups of training runs, each in a process of its own, resumable and failing alone.

A group is what shares compiled steps: one data set, model, recipe and optimizer, with its seeds and
the learning rates to choose from. Compilation takes longer than the steps of a short run, and a
rate or a seed is a value in the compiled step, so a process for each group compiles once for all
its cells, and what breaks a process breaks no other group.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from experiments.cli import UserError
from experiments.data import DATASETS, embedded
from experiments.runs.finetuning import FinetuneConfig
from experiments.runs.folders import write_json
from experiments.runs.kinds import kind_named
from experiments.runs.saved_config import config_from_json
from experiments.sweeps.specs import Axis, Spec, parse
from fqt_jax.kernels import check_implementation

_EXTENSIONS = 2
"""How often a grid of rates grows where its best rate lies on its edge."""

RATES = {"sgd": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
"""Learning rates to choose from, by optimizer."""
OTHER_RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates to choose from, for all other optimizers."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """What all sweeps share."""

    models: tuple[str, ...] = ("vgg_small:width=1", "resnet18:width=0.25")
    """Models, as NAME[:OPTION=VALUE,...] with the options width, stem and checkpoint."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of initialization, order, augmentation and rounding; all share one pretraining."""
    jobs: int = 1
    """Processes at a time; with more than one, the times of steps mean nothing."""
    implementation: str | None = None
    """The kernels' implementation; the default is the best that serves."""
    cache: pathlib.Path = pathlib.Path("runs/pretrained")
    """Where pretrained models are kept."""

    def __post_init__(self) -> None:
        check_implementation(self.implementation)
        if not self.models:
            raise UserError("models must name one at least.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("seeds must be distinct, and one at least.")
        if self.jobs < 1:
            raise UserError(f"jobs must be at least 1; got {self.jobs}.")

    def group(
        self, points: dict[Axis, Spec], rates: Sequence[float] = (), tuning: int = 1
    ) -> Group:
        """The group at a point of each axis.

        Raises:
          UserError, ValueError: options are out of range or contradict each other.
        """
        options: dict[str, Any] = {}
        for spec in points.values():
            options |= spec.options
        base = FinetuneConfig(
            **{"pretrain_seed": 0, **options},
            implementation=self.implementation,
            cache=self.cache,
        )
        if base.dataset not in DATASETS:
            raise UserError(f"unknown data set {base.dataset!r}; known: {', '.join(DATASETS)}.")
        if base.dataset not in embedded.NAMES and not (base.checkpoint or base.from_scratch):
            raise UserError(
                f"{base.dataset} needs a start: add checkpoint=FOLDER to the model, or "
                "from_scratch to the data set."
            )
        labels: dict[str, str] = {axis: spec.label for axis, spec in points.items()}
        return Group(labels, base, tuple(self.seeds), tuple(sorted(set(rates))), tuning)


def parse_all(axis: Axis, texts: Sequence[str]) -> list[Spec]:
    """Reads the points of an axis.

    Raises:
      UserError: there is none, two have one label, or one is wrong; see :func:`parse`.
    """
    specs = [parse(axis, text) for text in texts]
    labels = [spec.label for spec in specs]
    if not specs or len(set(labels)) < len(labels):
        raise UserError(f"give at least one {axis}, and each once; got {', '.join(labels)}.")
    return specs


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a name that follows from its options alone, and the options."""

    name: str
    config: FinetuneConfig


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that share their compiled steps.

    Args:
      labels: how tables call the group's point on each axis.
      base: the options of its runs.
      seeds: of the runs that count.
      rates: learning rates to choose from by validation accuracy; with none, the rate is that of
        ``base``.
      tuning: how many seeds, the first ones, try every rate; the mean over them chooses.

    Raises:
      UserError, ValueError: options are out of range or contradict each other.
    """

    labels: dict[str, str]
    base: FinetuneConfig
    seeds: tuple[int, ...]
    rates: tuple[float, ...] = ()
    tuning: int = 1

    def __post_init__(self) -> None:
        self.base.build_recipe()
        self.base.build_estimator()
        self.base.build_optimizer()
        for seed in self.seeds:
            self.cell(seed)
        if not 1 <= self.tuning <= len(self.seeds):
            raise UserError(
                f"rates can be tuned on 1 to {len(self.seeds)} seeds, not {self.tuning}."
            )
        if any(not 0 < rate < math.inf for rate in self.rates):
            raise UserError(f"rates must be positive numbers; got {self.rates}.")

    @property
    def name(self) -> str:
        """The group's labels, for messages."""
        return ", ".join(self.labels.values())

    def cell(self, seed: int, rate: float | None = None) -> Cell:
        """The run of a seed, at a rate or at that of the options."""
        config = dataclasses.replace(self.base, seed=seed)
        if rate is not None:
            config = dataclasses.replace(config, learning_rate=rate, head_learning_rate=None)
        # Defaults stay out of the name, so that an option added later renames no run.
        default = FinetuneConfig().to_json()
        values = {k: v for k, v in config.to_json().items() if v != default[k]}
        values = {k: v for k, v in values.items() if k not in ("cache", "data_dir")}
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
        lr = config.build_optimizer().rates()[0]
        text = f"{config.dataset}-{config.model}-{config.variant}-{config.optimizer}-{lr:g}"
        return Cell(f"{re.sub(r'[^A-Za-z0-9.-]+', '_', text)}-seed{seed}-{digest}", config)

    @property
    def is_text(self) -> bool:
        """Whether runs are judged by bits per character, and not by accuracy."""
        return "bits" in kind_named(self.base.dataset).metrics

    def to_json(self) -> dict[str, Any]:
        """The group as JSON values."""
        return {**dataclasses.asdict(self), "base": self.base.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Group:
        """The group that :meth:`to_json` wrote."""
        base = config_from_json(FinetuneConfig, values["base"])
        # Results written before rates could be tuned on several seeds do not name their number.
        tuning = values.get("tuning", 1)
        return cls(values["labels"], base, tuple(values["seeds"]), tuple(values["rates"]), tuning)


@dataclasses.dataclass(frozen=True)
class Store:
    """The folder of a sweep, in which each cell has one of its own."""

    root: pathlib.Path

    def folder(self, cell: Cell) -> pathlib.Path:
        """Where a cell's run is kept."""
        return self.root / "cells" / cell.name

    def summary(self, cell: Cell) -> dict[str, Any] | None:
        """What a finished run came to.

        Raises:
          UserError: the file is damaged, as for all of these.
        """
        return self._read(cell, "summary.json", _SUMMARY)

    def history(self, cell: Cell) -> list[dict[str, Any]]:
        """The epochs of a run that was finished."""
        path = self.folder(cell) / "metrics.jsonl"
        try:
            return [dict(json.loads(line)) for line in path.read_text().splitlines()]
        except (FileNotFoundError, ValueError, TypeError):
            raise self._damaged(cell, path.name) from None

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        """Why a run failed: ``error``, and whether it ``diverged``, which it would do again."""
        return self._read(cell, "failure.json", {"error": str, "diverged": bool})

    def fail(self, cell: Cell, error: str, *, diverged: bool = False) -> None:
        """Notes that a run failed."""
        self.folder(cell).mkdir(parents=True, exist_ok=True)
        failure = {"error": " ".join(error.split()), "diverged": diverged}
        write_json(self.folder(cell) / "failure.json", failure)

    def check(self, cell: Cell) -> None:
        """Reads all that is there of a cell.

        Raises:
          UserError: a file is damaged.
        """
        self.failure(cell)
        if self.summary(cell):
            self.history(cell)

    def settled(self, cell: Cell) -> bool:
        """Whether running the cell again could change nothing."""
        failure = self.failure(cell)
        return self.summary(cell) is not None or (failure is not None and failure["diverged"])

    def _read(self, cell: Cell, name: str, kinds: dict[str, Any]) -> dict[str, Any] | None:
        try:
            values = json.loads((self.folder(cell) / name).read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            values = None
        if not isinstance(values, dict) or any(
            key not in values or not isinstance(values[key], kind) for key, kind in kinds.items()
        ):
            raise self._damaged(cell, name)
        return values

    def _damaged(self, cell: Cell, name: str) -> UserError:
        path = self.folder(cell) / name
        return UserError(f"{path} is damaged: remove its folder to run that cell again.")


_SUMMARY: dict[str, Any] = {
    "validation_accuracy": int | float,
    "validation_loss": int | float,
    "test_accuracy": int | float,
    "gradient_bits": int | float,
    "step_ms": int | float | None,
}
"""What tables take from a summary."""


def plan(group: Group, store: Store) -> Iterator[Cell]:
    """The cells of a group, in the order in which they have to run.

    Which come later depends on the results of those before: first the grid of rates on the seeds
    that tune; then, as long as the best rate lies on the edge of the grid, a rate beyond it; then
    all seeds at the best rate. Cells may come twice.
    """
    rate = None
    if group.rates:
        for rate in group.rates:
            yield from _tuning_cells(group, rate)
        rates = list(group.rates)
        for _ in range(_EXTENSIONS):
            more = _beyond(rates, best_rate(group, rates, store))
            if more is None:
                break
            rates = sorted([*rates, more])
            yield from _tuning_cells(group, more)
        rate = best_rate(group, rates, store)
        if rate is None:
            return
    for seed in group.seeds:
        yield group.cell(seed, rate)


def _tuning_cells(group: Group, rate: float) -> list[Cell]:
    return [group.cell(seed, rate) for seed in group.seeds[: group.tuning]]


def best_rate(group: Group, rates: Sequence[float], store: Store) -> float | None:
    """The rate of the highest validation accuracy, then of the least validation loss.

    Where text is the data, the loss comes first: it is the bits per character. Both are means over
    the seeds that tune; a rate at which one of them failed is not chosen. None where that happened
    at every rate.
    """
    found = []
    for rate in rates:
        validation = _validation(group, rate, store)
        if validation is not None:
            accuracy, loss = validation
            order = (-loss, accuracy) if group.is_text else (accuracy, -loss)
            found.append((*order, rate))
    return max(found)[-1] if found else None


def _validation(group: Group, rate: float, store: Store) -> tuple[float, float] | None:
    """Accuracy and loss, means over the seeds that tune; None where one of them failed."""
    found = [store.summary(cell) for cell in _tuning_cells(group, rate)]
    summaries = [summary for summary in found if summary is not None]
    if len(summaries) < group.tuning:
        return None
    accuracy, loss = (
        fmean(summary[f"validation_{name}"] for summary in summaries)
        for name in ("accuracy", "loss")
    )
    return accuracy, loss


def _beyond(rates: Sequence[float], best: float | None) -> float | None:
    """The next rate, where the best one is the least or the greatest; two digits of it."""
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    factor = rates[0] / rates[1] if best == rates[0] else rates[-1] / rates[-2]
    return float(f"{best * factor:.1e}")


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a group.

    Attributes:
      group: the group.
      rate: the learning rate, chosen or given; None where no run of the grid came to its end.
      tried: validation accuracy, or of text bits per character, by rate, over the seeds that tune;
        None where one of them failed.
      summaries: of the finished runs at that rate, by seed.
      histories: their epochs.
      failures: what went wrong, by the cell's name.
    """

    group: Group
    rate: float | None
    tried: dict[float, float | None]
    summaries: dict[int, dict[str, Any]]
    histories: dict[int, list[dict[str, Any]]]
    failures: dict[str, str]

    def values(self, name: str) -> list[float]:
        """A number of the summaries, seed by seed, where it was measured."""
        found = (summary[name] for summary in self.summaries.values())
        return [float(value) for value in found if value is not None]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values, without the histories, which are in the cells' folders."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("group", "histories")
        }
        return {**self.group.to_json(), **values}


def collect(group: Group, store: Store) -> Result:
    """Reads what became of a group from its folders."""
    cells = {cell.name: cell for cell in plan(group, store)}
    tried: dict[float, float | None] = {}
    if group.rates:
        for cell in cells.values():
            rate = cell.config.learning_rate
            if cell.config.seed == group.seeds[0] and rate is not None:
                validation = _validation(group, rate, store)
                tried[rate] = validation and (
                    validation[1] / math.log(2) if group.is_text else validation[0]
                )
    chosen = best_rate(group, sorted(tried), store)
    none_left = bool(group.rates) and chosen is None
    final = {} if none_left else {seed: group.cell(seed, chosen) for seed in group.seeds}
    summaries = {seed: summary for seed, cell in final.items() if (summary := store.summary(cell))}
    failures = {}
    for cell in cells.values():
        if store.summary(cell) is None:
            failure = store.failure(cell)
            if failure and failure["diverged"] and cell not in final.values() and final:
                continue  # a rate of the grid that is too high is no failure
            failures[cell.name] = failure["error"] if failure else "did not run"
    histories = {seed: store.history(final[seed]) for seed in summaries}
    tried = {rate: tried[rate] for rate in sorted(tried)}
    if not group.rates:
        chosen = group.base.build_optimizer().rates()[0]
    return Result(group, chosen, tried, summaries, histories, failures)
