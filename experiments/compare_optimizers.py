"""Compares optimizers under the recipes, each at learning rates tuned for it.

    python -m experiments.compare_optimizers --optimizers adam sgd --recipes qat psq1 fqt1

For each model, recipe and optimizer the rate of the best validation accuracy is chosen from a grid,
on the first seed, or with --tuning-seeds on more; a grid whose best rate lies on its edge grows,
twice at most. Then all seeds run at that rate. An optimizer with a rate, as in
``adam:learning_rate=1e-3``, keeps it. The command again continues a sweep that was stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib

from experiments import cli
from experiments.show.formats import Estimate, Table, count
from experiments.sweeps.plots import plot_curves
from experiments.sweeps.run import run_groups
from experiments.sweeps.specs import Spec, parse
from experiments.sweeps.sweep import OTHER_RATES, RATES, Result, SweepConfig, parse_all
from experiments.sweeps.tables import publish, score_of


@dataclasses.dataclass(frozen=True)
class CompareConfig(SweepConfig):
    """What is compared. An option after a name changes that run: fqt1:bits=2,keep=1."""

    task: str = "mnist5k to digits=digits:epochs=10,batch_size=64"
    """Data set, as [LABEL=]NAME[:OPTION=VALUE,...], with options such as epochs or limit."""
    recipes: tuple[str, ...] = ("qat", "psq1", "fqt1", "fqt1_plus")
    """Recipes, as [LABEL=]NAME[:OPTION=VALUE,...]."""
    optimizers: tuple[str, ...] = ("adam", "sgd")
    """Optimizers, with options such as weight_decay, momentum, schedule, and learning_rate, which
    is then not tuned."""
    rates: tuple[float, ...] = ()
    """Learning rates to choose from; the default is 3e-4, 1e-3, 3e-3, and 1e-3 to 1e-1 for
    sgd."""
    tuning_seeds: int = 1
    """How many of the seeds try every rate; few validation images tell rates apart badly on one."""
    baseline: str = "qat"
    """The recipe, by its label, from which degradation is measured."""
    out: pathlib.Path = pathlib.Path("runs/compare_optimizers")
    """Folder of the sweep; what it holds already is not run again."""


def main(config: CompareConfig) -> None:
    """Runs the experiment."""
    task = parse("dataset", config.task)
    models = parse_all("model", config.models)
    recipes = parse_all("recipe", config.recipes)
    optimizers = parse_all("optimizer", config.optimizers)
    points = list(itertools.product(models, recipes, optimizers))
    groups = [
        config.group(
            {"dataset": task, "model": model, "recipe": recipe, "optimizer": optimizer},
            _grid(config, optimizer),
            config.tuning_seeds,
        )
        for model, recipe, optimizer in points
    ]
    found = run_groups(groups, config.out, config.jobs)
    results = {
        (model.label, recipe.label, optimizer.label): result
        for (model, recipe, optimizer), result in zip(points, found, strict=True)
    }
    tables = []
    for i, model in enumerate(models):
        of_model = {key[1:]: value for key, value in results.items() if key[0] == model.label}
        title = f"{task.label}, {model.label}"
        tables += _tables(config, title, recipes, optimizers, of_model)
        panels = [
            (r.label, [(o.label, of_model[r.label, o.label]) for o in optimizers]) for r in recipes
        ]
        plot_curves(panels, title, config.out / f"curves-{i + 1}-{model.options['model']}.png")
    publish(config.out, dataclasses.asdict(config), found, tables)


def _grid(config: CompareConfig, optimizer: Spec) -> tuple[float, ...]:
    """The rates to choose from; none where the optimizer comes with one."""
    if "learning_rate" in optimizer.options:
        return ()
    return config.rates or RATES.get(optimizer.options["optimizer"], OTHER_RATES)


def _tables(
    config: CompareConfig,
    title: str,
    recipes: list[Spec],
    optimizers: list[Spec],
    results: dict[tuple[str, str], Result],
) -> list[Table]:
    """What the test came to, at which rates, and the degradation from the baseline."""
    n, score = len(config.seeds), score_of(next(iter(results.values())))
    names = [optimizer.label for optimizer in optimizers]
    rows, losses = [], []
    for recipe in recipes:
        own = [results[recipe.label, name] for name in names]
        rows.append(
            [recipe.label]
            + [f"{score.of(r).text(n)} at {r.rate:g}" if r.rate else "-" for r in own]
        )
        baselines = [results.get((config.baseline, name)) for name in names]
        if recipe.label != config.baseline and None not in baselines:
            losses.append(
                [recipe.label]
                + [
                    Estimate.of([*score.gains(base, r).values()], score.form).text(n)
                    for base, r in zip(baselines, own, strict=True)
                    if base is not None
                ]
            )
    tables = [
        Table(
            f"{title}: test {score.title}, mean ± deviation over {count(n, 'seed')}, at the rate "
            f"given with the optimizer or tuned on validation data with "
            f"{count(config.tuning_seeds, 'seed')}",
            ["recipe", *names],
            rows,
            [_edge(result) for result in results.values() if _edge(result)],
        )
    ]
    if losses:
        text = f"{title}: degradation from {config.baseline}, {score.unit}"
        tables.append(Table(text, ["recipe", *names], losses))
    return tables


def _edge(result: Result) -> str:
    """A warning where the best rate lies on the edge of what was tried; empty elsewhere."""
    if result.rate is None or len(result.tried) < 2 or result.rate not in _ends(result):
        return ""
    return f"{result.group.name}: the best rate, {result.rate:g}, lies on the edge of the grid."


def _ends(result: Result) -> tuple[float, float]:
    return min(result.tried), max(result.tried)


if __name__ == "__main__":
    cli.run(main, CompareConfig)
