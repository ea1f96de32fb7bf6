"""Takes the method apart: one choice at a time, with its accuracy and its cost.

    python -m experiments.ablate --studies bits keep sampler

The cost of a variant is the bits of a gradient entry and the measured time of a step, its median.
A variant that several studies share runs once. The command again continues a sweep that was
stopped.
"""

from __future__ import annotations

import dataclasses
import pathlib

from experiments import cli
from experiments.cli import UserError
from experiments.show.formats import Estimate, Table, count, number
from experiments.sweeps.plots import Row, plot_intervals
from experiments.sweeps.run import run_groups
from experiments.sweeps.specs import Spec, parse
from experiments.sweeps.sweep import Result, SweepConfig, parse_all
from experiments.sweeps.tables import ACCURACY, cost, publish

STUDIES: dict[str, tuple[str, ...]] = {
    "baselines": ("qat", "psq1", "fqt1"),
    "bits": ("fqt1:bits=1", "fqt1:bits=2", "fqt1", "fqt1:bits=8"),
    "keep": ("fqt1:keep=0.125", "fqt1", "fqt1:keep=0.5", "fqt1:keep=1"),
    "sampler": ("fqt1", "fqt1:sampler=bernoulli", "fqt1:sampler=topk", "fqt1:sampler=uniform"),
    "groups": (
        "fqt1:prune=shared",
        "fqt1:prune=shared,groups=sample",
        "fqt1:prune=shared,groups=tensor",
        "psq1",
        "psq1:groups=sample_channel",
    ),
    "scale": ("fqt1:scale=none", "fqt1", "fqt1:scale=learned"),
    "clip": ("fqt1:clip=false", "fqt1"),
    "controls": ("fqt1:sampler=uniform", "psq1", "psq1:bits=4", "psq1:bits=8"),
    "estimators": (
        "fqt1",
        "fqt1:importance=norm",
        "fqt1_plus",
        "fqt1_plus:importance=norm",
        "fqt1_plus:stratify",
        "fqt1:one_draw",
        "fqt1:one_draw,stratify",
    ),
}
"""What is varied: b with keep = 1/b; keep apart from b; the sampler of AGP; SCQ (groups of samples
and channels) against per-sample and per-tensor quantization of the same samples; the scale of the
weights and the clip of the straight-through gradient, pretraining included; random pruning and
unpruned PSQ of 4 and 8 bits; and where the weight gradient spends its budget."""

COSTS = {"bits an entry": "gradient_bits", "ms a step": "step_ms"}
"""What a recipe costs: titles, and the names in a run's summary."""


@dataclasses.dataclass(frozen=True)
class AblateConfig(SweepConfig):
    """What is taken apart."""

    models: tuple[str, ...] = ("vgg_small:width=1",)
    """Models, as NAME[:OPTION=VALUE,...] with the options width, stem and checkpoint."""
    task: str = "mnist5k to digits=digits:epochs=10,batch_size=64,learning_rate=1e-3"
    """Data set, as [LABEL=]NAME[:OPTION=VALUE,...], with options such as epochs or limit."""
    optimizer: str = "adam"
    """Optimizer, with options such as weight_decay, momentum and schedule."""
    studies: tuple[str, ...] = tuple(STUDIES)
    """What is varied: baselines, bits, keep, sampler, groups, scale, clip, controls, estimators."""
    recipes: tuple[str, ...] = ()
    """A study of one's own: recipes, as [LABEL=]NAME[:OPTION=VALUE,...]."""
    out: pathlib.Path = pathlib.Path("runs/ablate")
    """Folder of the sweep; what it holds already is not run again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.studies:
            if name not in STUDIES:
                raise UserError(f"unknown study {name!r}; known studies: {', '.join(STUDIES)}.")
        if not self.studies and not self.recipes:
            raise UserError("give studies or recipes.")


def main(config: AblateConfig) -> None:
    """Runs the experiment."""
    task = parse("dataset", config.task)
    models = parse_all("model", config.models)
    optimizer = parse("optimizer", config.optimizer)
    studies = {name: parse_all("recipe", STUDIES[name]) for name in config.studies}
    if config.recipes:
        studies["recipes"] = parse_all("recipe", config.recipes)
    variants = {spec.label: spec for specs in studies.values() for spec in specs}
    points = [(model, recipe) for model in models for recipe in variants.values()]
    groups = [
        config.group({"dataset": task, "model": model, "recipe": recipe, "optimizer": optimizer})
        for model, recipe in points
    ]
    found = run_groups(groups, config.out, config.jobs)
    results = {
        (model.label, recipe.label): result
        for (model, recipe), result in zip(points, found, strict=True)
    }
    tables = []
    for i, model in enumerate(models):
        title = f"{task.label}, {model.label}, {optimizer.label}"
        tables.append(_table(config, title, studies, model, results))
        plot_intervals(
            _rows(studies, model, results),
            f"{title}: mean ± deviation over {count(len(config.seeds), 'seed')}",
            config.out / f"errors-{i + 1}-{model.options['model']}.png",
            reference="fqt1",
        )
    publish(config.out, dataclasses.asdict(config), found, tables)


def _rows(
    studies: dict[str, list[Spec]], model: Spec, results: dict[tuple[str, str], Result]
) -> list[Row]:
    rows = []
    for study, specs in studies.items():
        for spec in specs:
            result = results[model.label, spec.label]
            own = ACCURACY.of(result)
            error = Estimate(100 - own.mean, own.deviation, own.n)
            rows.append(Row(study, spec.label, error, result.group.base.variant, _costs(result)))
    return rows


def _costs(result: Result) -> dict[str, str]:
    return {title: number(cost(result, name), ".3g") for title, name in COSTS.items()}


def _table(
    config: AblateConfig,
    title: str,
    studies: dict[str, list[Spec]],
    model: Spec,
    results: dict[tuple[str, str], Result],
) -> Table:
    n = len(config.seeds)
    rows = []
    for study, specs in studies.items():
        for i, spec in enumerate(specs):
            result = results[model.label, spec.label]
            row = [study if i == 0 else "", spec.label, ACCURACY.of(result).text(n)]
            rows.append([*row, *_costs(result).values()])
    return Table(
        f"{title}: test accuracy, mean ± deviation over {count(n, 'seed')}, and cost",
        ["study", "recipe", "accuracy, %", *COSTS],
        rows,
        ["Times were taken beside other processes."] if config.jobs > 1 else [],
        names=2,
    )


if __name__ == "__main__":
    cli.run(main, AblateConfig)
