"""The main table: data sets by models by recipes, with deviations over seeds.

    python -m experiments.tables --preset embedded --jobs 2

Its closing rows are the mean over the tasks, the gain over one bit with nothing pruned (the paper:
about 6 points) and the loss to quantization-aware training. The command again continues a sweep
that was stopped.

    python -m experiments.tables --preset embedded --tune 0.5 1 --tuning-seeds 3

tunes the learning rate of each cell on validation images; a noisy gradient wants another than an
exact one.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from statistics import fmean
from typing import Literal

from experiments import cli
from experiments.show.formats import Estimate, Table, count, number
from experiments.sweeps.run import run_groups
from experiments.sweeps.specs import Axis, Spec, parse
from experiments.sweeps.sweep import Group, Result, SweepConfig, parse_all
from experiments.sweeps.tables import accuracy, differences, publish

_RECIPES = (
    "qat",
    "psq1",
    "fqt1",
    "fqt1_plus",
    "fqt1_plus:stratify",
    "fqt1:one_draw",
    "fqt1:one_draw,stratify",
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """Axes of a table, and how many of its processes run at a time."""

    datasets: tuple[str, ...]
    models: tuple[str, ...]
    jobs: int


PRESETS = {
    "embedded": Preset(
        datasets=(
            "mnist5k to digits=digits:epochs=10,batch_size=64,learning_rate=1e-3",
            "mnist5k from scratch=mnist5k:from_scratch,epochs=8,learning_rate=8e-3",
        ),
        models=("vgg_small:width=1", "resnet18:width=0.25"),
        jobs=2,  # most of a short run is compilation, on one core
    ),
    "paper": Preset(
        datasets=(
            "cifar10",
            "cifar100",
            "oxford_flowers102",
            "oxford_iiit_pet",
            "cars196",
            "caltech_birds2011",
        ),
        models=("vgg16:width=1", "resnet18:width=1"),
        jobs=1,
    ),
}
"""``embedded`` needs no download; its rates are those at which ``qat`` does best on validation
images. ``paper`` is the paper's, at its rates and number of epochs, from a checkpoint of each
model, such as ``--models vgg16:width=1,checkpoint=runs/NAME``."""


@dataclasses.dataclass(frozen=True)
class TablesConfig(SweepConfig):
    """What the table holds. What is given replaces that part of the preset."""

    preset: Literal["embedded", "paper"] = "embedded"
    """Data sets and models; the paper's are read as prepared by tensorflow-datasets."""
    datasets: tuple[str, ...] = ()
    """Data sets, as [LABEL=]NAME[:OPTION=VALUE,...], with options such as epochs, limit,
    from_scratch and data_dir."""
    models: tuple[str, ...] = ()
    """Models, as NAME[:OPTION=VALUE,...] with the options width, stem and checkpoint."""
    recipes: tuple[str, ...] = _RECIPES
    """Recipes, as [LABEL=]NAME[:OPTION=VALUE,...]."""
    optimizer: str = "adam"
    """Optimizer, with options such as weight_decay, momentum and schedule."""
    jobs: int = 0
    """Processes at a time; 0 for the preset's, 2 for embedded and 1 for paper."""
    tune: tuple[float, ...] = ()
    """Factors on a data set's learning rate to choose from by validation accuracy, cell by cell;
    where the best lies on the edge, more are tried. The default is the data set's rate."""
    tuning_seeds: int = 1
    """How many of the seeds try every rate."""
    low: str = "psq1"
    """The recipe, by its label, over which the gain is counted."""
    high: str = "qat"
    """The recipe, by its label, from which the loss is counted."""
    out: pathlib.Path | None = None
    """Folder of the sweep, by default runs/tables-PRESET; what it holds is not run again."""

    def __post_init__(self) -> None:
        if not self.models:
            object.__setattr__(self, "models", PRESETS[self.preset].models)
        if self.jobs == 0:
            object.__setattr__(self, "jobs", PRESETS[self.preset].jobs)
        super().__post_init__()


def main(config: TablesConfig) -> None:
    """Runs the experiment."""
    datasets = parse_all("dataset", config.datasets or PRESETS[config.preset].datasets)
    models = parse_all("model", config.models)
    recipes = parse_all("recipe", config.recipes)
    optimizer = parse("optimizer", config.optimizer)
    points = list(itertools.product(datasets, models, recipes))
    groups = [
        _group(
            config, {"dataset": dataset, "model": model, "recipe": recipe, "optimizer": optimizer}
        )
        for dataset, model, recipe in points
    ]
    root = config.out or pathlib.Path("runs") / f"tables-{config.preset}"
    found = run_groups(groups, root, config.jobs)
    results = {
        (dataset.label, model.label, recipe.label): result
        for (dataset, model, recipe), result in zip(points, found, strict=True)
    }
    table = _table(config, datasets, models, recipes, results)
    publish(root, dataclasses.asdict(config), found, [table])


def _group(config: TablesConfig, point: dict[Axis, Spec]) -> Group:
    """The group at a point, with the rates to choose from."""
    group = config.group(point)
    if not config.tune:
        return group
    rate = group.base.build_optimizer().rates()[0]
    # Two digits, so that equal rates of different tables are one.
    rates = [float(f"{factor * rate:.1e}") for factor in config.tune]
    return config.group(point, rates, config.tuning_seeds)


Results = dict[tuple[str, str, str], Result]


def _table(
    config: TablesConfig,
    datasets: list[Spec],
    models: list[Spec],
    recipes: list[Spec],
    results: Results,
) -> Table:
    n = len(config.seeds)
    names = [recipe.label for recipe in recipes]
    tasks = [(d.label, m.label) for d in datasets for m in models]
    rows = [
        [dataset, model, *(_cell(config, results[dataset, model, name]) for name in names)]
        for dataset, model in tasks
    ]
    complete = [task for task in tasks if all(results[*task, name].summaries for name in names)]
    means = [
        fmean(accuracy(results[*task, name]).mean for task in complete) if complete else None
        for name in names
    ]
    rows.append(["mean", "", *(number(mean, ".1f") for mean in means)])
    for title, baseline, sign in (
        (f"gain over {config.low}", config.low, 1),
        (f"loss to {config.high}", config.high, -1),
    ):
        if baseline in names:
            gains = {k: mean_gain(results, complete, k, baseline, sign) for k in names}
            cells = ["" if name == baseline else str(gain) for name, gain in gains.items()]
            rows.append([title, "", *cells])
    notes = ["Gains and losses are points, means over the rows, with their deviation over seeds."]
    if config.tune:
        seeds = count(config.tuning_seeds, "seed")
        notes.append(f"Each at the rate of the best validation accuracy, over {seeds}.")
    if len(complete) < len(tasks):
        notes.append("The closing rows leave out what not every recipe finished.")
    return Table(
        f"Test accuracy, %, mean ± deviation over {count(n, 'seed')}; {config.optimizer}",
        ["data set", "model", *names],
        rows,
        notes,
        names=2,
    )


def _cell(config: TablesConfig, result: Result) -> str:
    text = accuracy(result).text(len(config.seeds))
    return f"{text} at {result.rate:g}" if config.tune and result.rate is not None else text


def mean_gain(
    results: Results, tasks: list[tuple[str, str]], name: str, baseline: str, sign: int = 1
) -> Estimate:
    """Points of a recipe over another, averaged over the tasks, with the deviation over seeds.

    Only seeds count that both recipes finished on every task.
    """
    gains = [differences(results[*task, name], results[*task, baseline]) for task in tasks]
    seeds = set(gains[0]).intersection(*gains) if gains else set()
    return Estimate.of([sign * fmean(gain[seed] for gain in gains) for seed in sorted(seeds)])


if __name__ == "__main__":
    cli.run(main, TablesConfig)
