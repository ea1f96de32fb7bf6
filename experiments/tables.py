"""The main table: data sets by models by recipes, with deviations over seeds.

    python -m experiments.tables --preset embedded --jobs 2

Its closing rows are the mean over the tasks, the gain over one bit with nothing pruned (the paper:
about 6 points) and the loss to quantization-aware training. The command again continues a sweep
that was stopped.

    python -m experiments.tables --preset embedded --tune 0.5 1 --tuning-seeds 3

tunes the learning rate of each cell on validation data; a noisy gradient wants another than an
exact one.

    python -m experiments.tables --preset sequences

is about Transformers and recurrent networks. Models of text go with text, which is told in bits per
character, and models of images with images.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from statistics import fmean
from typing import Literal

from experiments import cli
from experiments.runs.kinds import kind_named
from experiments.show.formats import Estimate, Table, count
from experiments.sweeps.run import run_groups
from experiments.sweeps.specs import Axis, Spec, parse
from experiments.sweeps.sweep import Group, Result, SweepConfig, parse_all
from experiments.sweeps.tables import Score, publish, score_of
from fqt_jax.models import TOKEN_MODELS

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
    recipes: tuple[str, ...] = _RECIPES


PRESETS = {
    "embedded": Preset(
        datasets=(
            "mnist5k to digits=digits:epochs=10,batch_size=64,learning_rate=1e-3",
            "mnist5k from scratch=mnist5k:from_scratch,epochs=8,learning_rate=8e-3",
        ),
        models=("vgg_small:width=1", "resnet18:width=0.25"),
        jobs=2,  # most of a short run is compilation, on one core
    ),
    "sequences": Preset(
        datasets=(
            "pydoc from scratch=pydoc:from_scratch,epochs=3,batch_size=32,learning_rate=6e-3",
            "mnist5k from scratch=mnist5k:from_scratch,epochs=8,batch_size=32,learning_rate=4e-3,"
            "warmup_epochs=1",
            "mnist5k to digits=digits:epochs=10,batch_size=64,learning_rate=2e-3",
        ),
        models=(
            "gpt_small:width=0.25",
            "lstm:width=0.25",
            "gru:width=0.25",
            "vit_small:width=0.25",
        ),
        jobs=2,
        recipes=("full_precision", "qat", "psq1", "fqt1", "fqt1_plus", "fqt1:one_draw"),
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
images. ``sequences`` needs none either. ``paper`` is the paper's, at its rates and number of
epochs, from a checkpoint of each model, such as ``--models vgg16:width=1,checkpoint=runs/NAME``."""


@dataclasses.dataclass(frozen=True)
class TablesConfig(SweepConfig):
    """What the table holds. What is given replaces that part of the preset."""

    preset: Literal["embedded", "sequences", "paper"] = "embedded"
    """Data sets and models; the paper's are read as prepared by tensorflow-datasets."""
    datasets: tuple[str, ...] = ()
    """Data sets, as [LABEL=]NAME[:OPTION=VALUE,...], with options such as epochs, limit,
    from_scratch and data_dir."""
    models: tuple[str, ...] = ()
    """Models, as NAME[:OPTION=VALUE,...] with the options width, stem and checkpoint."""
    recipes: tuple[str, ...] = ()
    """Recipes, as [LABEL=]NAME[:OPTION=VALUE,...]."""
    optimizer: str = "adam"
    """Optimizer, with options such as weight_decay, momentum and schedule."""
    jobs: int = 0
    """Processes at a time; 0 for the preset's, 1 for paper and 2 for the others."""
    tune: tuple[float, ...] = ()
    """Factors on a data set's learning rate to choose from by validation accuracy, or of text by
    bits, cell by cell; where the best lies on the edge, more are tried. The default is the data
    set's rate."""
    tuning_seeds: int = 1
    """How many of the seeds try every rate."""
    low: str = "psq1"
    """The recipe, by its label, over which the gain is counted."""
    high: str = "qat"
    """The recipe, by its label, from which the loss is counted."""
    out: pathlib.Path | None = None
    """Folder of the sweep, by default runs/tables-PRESET; what it holds is not run again."""

    def __post_init__(self) -> None:
        for axis in ("datasets", "models", "recipes"):
            if not getattr(self, axis):
                object.__setattr__(self, axis, getattr(PRESETS[self.preset], axis))
        if self.jobs == 0:
            object.__setattr__(self, "jobs", PRESETS[self.preset].jobs)
        super().__post_init__()


def main(config: TablesConfig) -> None:
    """Runs the experiment."""
    tasks = pairs(parse_all("dataset", config.datasets), parse_all("model", config.models))
    recipes = parse_all("recipe", config.recipes)
    optimizer = parse("optimizer", config.optimizer)
    points = [(*task, recipe) for task in tasks for recipe in recipes]
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
    labels = [(dataset.label, model.label) for dataset, model in tasks]
    table = _table(config, labels, [recipe.label for recipe in recipes], results)
    publish(root, dataclasses.asdict(config), found, [table])


def pairs(datasets: list[Spec], models: list[Spec]) -> list[tuple[Spec, Spec]]:
    """Each data set with each model that takes such data.

    Raises:
      UserError: one of them is left alone.

    Example:
      >>> datasets = parse_all("dataset", ["pydoc", "digits"])
      >>> models = parse_all("model", ["vgg_small", "gpt_small", "lstm"])
      >>> [(dataset.label, model.label) for dataset, model in pairs(datasets, models)]
      [('pydoc', 'gpt_small'), ('digits', 'vgg_small'), ('digits', 'lstm')]
    """
    found = [
        (dataset, model)
        for dataset, model in itertools.product(datasets, models)
        if (kind_named(dataset.options["dataset"]).samples == "sequences")
        == (model.options["model"] in TOKEN_MODELS)
    ]
    for number, specs in enumerate((datasets, models)):
        alone = [spec.label for spec in specs if spec not in [pair[number] for pair in found]]
        if alone:
            others = ", ".join(spec.label for spec in (models, datasets)[number])
            raise cli.UserError(
                f"{alone[0]} goes with none of {others}: models of text take text, and the others "
                "images."
            )
    return found


def _group(config: TablesConfig, point: dict[Axis, Spec]) -> Group:
    """The group at a point, with the rates to choose from."""
    group = config.group(point)
    if not config.tune:
        return group
    rate = group.base.build_optimizer().rates()[0]
    # Two digits, so that equal rates of different tables are one.
    rates = [float(f"{factor * rate:.1e}") for factor in config.tune]
    return config.group(point, rates, config.tuning_seeds)


Task = tuple[str, str]
"""The labels of a data set and a model."""
Results = dict[tuple[str, str, str], Result]
"""By the labels of data set, model and recipe."""


def _table(config: TablesConfig, tasks: list[Task], names: list[str], results: Results) -> Table:
    n = len(config.seeds)
    rows = []
    for task in tasks:
        own = [results[*task, name] for name in names]
        dataset = f"{task[0]}, bits" if own[0].group.is_text else task[0]
        rows.append([dataset, task[1], *(_cell(config, result) for result in own)])
    complete = [task for task in tasks if all(results[*task, name].summaries for name in names)]
    scores = {task: score_of(results[*task, names[0]]) for task in tasks}
    distinct = list(dict.fromkeys(scores.values()))
    for score in distinct:
        own_tasks = [task for task in complete if scores[task] == score]
        rows += _closing(config, score, own_tasks, names, results, told=len(distinct) > 1)
    notes = [
        f"Gains and losses are {' or '.join(score.unit for score in distinct)}, means over the "
        "rows, with their deviation over seeds."
    ]
    if config.tune:
        seeds = count(config.tuning_seeds, "seed")
        what = " or ".join(score.title.partition(",")[0] for score in distinct)
        notes.append(f"Each at the rate of the best validation {what}, over {seeds}.")
    if len(complete) < len(tasks):
        notes.append("The closing rows leave out what not every recipe finished.")
    titles = ", and ".join(score.title for score in distinct)
    return Table(
        f"Test {titles}, mean ± deviation over {count(n, 'seed')}; {config.optimizer}",
        ["data set", "model", *names],
        rows,
        notes,
        names=2,
    )


def _closing(
    config: TablesConfig,
    score: Score,
    tasks: list[Task],
    names: list[str],
    results: Results,
    *,
    told: bool,
) -> list[list[str]]:
    """Mean, gain and loss over the tasks of one score; ``told`` says of which."""

    def mean(name: str) -> str:
        means = [score.of(results[*task, name]).mean for task in tasks]
        return format(fmean(means), score.form) if means else "-"

    rows = [[f"mean, {score.title}" if told else "mean", "", *map(mean, names)]]
    for title, baseline, sign in (
        (f"gain over {config.low}", config.low, 1),
        (f"loss to {config.high}", config.high, -1),
    ):
        if baseline in names:
            gains = {k: mean_gain(results, tasks, k, baseline, sign) for k in names}
            cells = ["" if name == baseline else str(gain) for name, gain in gains.items()]
            rows.append([f"{title}, {score.unit}" if told else title, "", *cells])
    return rows


def _cell(config: TablesConfig, result: Result) -> str:
    text = score_of(result).of(result).text(len(config.seeds))
    return f"{text} at {result.rate:g}" if config.tune and result.rate is not None else text


def mean_gain(
    results: Results, tasks: list[Task], name: str, baseline: str, sign: int = 1
) -> Estimate:
    """How much better a recipe is than another, averaged over the tasks, with the deviation over
    seeds.

    The tasks have one score. Only seeds count that both recipes finished on every task.
    """
    if not tasks:
        return Estimate.of([])
    score = score_of(results[*tasks[0], name])
    gains = [score.gains(results[*task, name], results[*task, baseline]) for task in tasks]
    seeds = set(gains[0]).intersection(*gains)
    means = [sign * fmean(gain[seed] for gain in gains) for seed in sorted(seeds)]
    return Estimate.of(means, score.form)


if __name__ == "__main__":
    cli.run(main, TablesConfig)
