"""How long training takes to reach given accuracies: float, in JAX and PyTorch, against 1 bit.

    python -m experiments.time_to_accuracy

What counts is seconds of training steps. Accuracy over steps comes from training runs, each at a
rate tuned on validation images; the time of a step is measured with all contenders taking turns,
as in experiments.speed, and compilation stands apart. So a slow spell of the machine distorts
nothing, and the command again continues a sweep that was stopped and measures the times anew.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments import cli
from experiments.bench import machine
from experiments.bench.contenders import FLOATS, SPEED_RECIPES, Setting, layers_of
from experiments.bench.measure import in_process
from experiments.bench.torch_steps import missing
from experiments.runs.folders import write_json
from experiments.runs.tasks import load_dataset
from experiments.show import race
from experiments.sweeps.run import run_groups
from experiments.sweeps.specs import Spec, parse
from experiments.sweeps.sweep import OTHER_RATES, Group, Result, SweepConfig, parse_all
from experiments.sweeps.tables import ACCURACY, publish
from fqt_jax.models import TOKEN_MODELS

_FLOAT = "full_precision"
"""The recipe whose accuracy all float contenders take."""


@dataclasses.dataclass(frozen=True)
class TimeConfig(SweepConfig):
    """Who races, and to where."""

    models: tuple[str, ...] = ("vgg11:width=1", "resnet18:width=1")
    """Models, as NAME[:OPTION=VALUE,...] with the options width, stem and checkpoint."""
    tasks: tuple[str, ...] = ("mnist5k from scratch=mnist5k:from_scratch,epochs=10,image_size=32",)
    """Data sets, as [LABEL=]NAME[:OPTION=VALUE,...]; without from_scratch, digits is fine-tuned
    from mnist5k."""
    contenders: tuple[str, ...] = ()
    """Who takes part, named as in experiments.speed: torch, torch_compile, torch_bf16,
    torch_bf16_compile, jax, jax_bf16, full_precision, qat, psq1, fqt1, fqt1_plus, fqt1_one_draw,
    fqt1_budget, fqt1_plus_budget. The default is all but psq1, full_precision and the last two, and
    those of PyTorch where it is installed."""
    targets: tuple[float, ...] = (90.0, 95.0, 97.0)
    """Accuracies on the test images in %; what the baseline ends with is added."""
    baseline: str | None = None
    """The contender whose accuracy at the end is a target too; the default is qat, where it takes
    part."""
    rates: tuple[float, ...] = OTHER_RATES
    """Learning rates to choose from by validation accuracy; where the best lies on the edge, more
    are tried."""
    tuning_seeds: int = 1
    """How many of the seeds try every rate."""
    repeats: int = 5
    """Measurements of each step's time; the median counts."""
    out: pathlib.Path = pathlib.Path("runs/time_to_accuracy")
    """Folder of the sweep; what it holds already is not run again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (*FLOATS, *(name for name in SPEED_RECIPES if name not in FLOATS))
        for name in self.contenders:
            if name not in known:
                raise cli.UserError(f"unknown contender {name!r}; known: {', '.join(known)}.")
        if len(set(self.contenders)) < len(self.contenders):
            raise cli.UserError("contenders must be distinct.")
        if not all(0 < target <= 100 for target in self.targets):
            raise cli.UserError(f"targets must be in (0, 100] %; got {self.targets}.")
        names = self.names()
        if self.baseline is None and "qat" in names:
            object.__setattr__(self, "baseline", "qat")
        if self.baseline not in (None, *names):
            raise cli.UserError(
                f"the baseline {self.baseline!r} is no contender: {', '.join(names)}."
            )
        if self.repeats < 1:
            raise cli.UserError(f"repeats must be at least 1; got {self.repeats}.")

    def names(self) -> list[str]:
        """The contenders."""
        if self.contenders:
            return list(self.contenders)
        even = (name for name, variant in SPEED_RECIPES.items() if variant.budget == "layer")
        usual = [*FLOATS[:-1], *(name for name in even if name not in ("psq1", _FLOAT))]
        if missing() is not None:
            usual = [name for name in usual if not name.startswith("torch")]
        return usual


def main(config: TimeConfig) -> None:
    """Runs the experiment."""
    names = config.names()
    reason = missing()
    if reason is not None and any(name.startswith("torch") for name in names):
        raise cli.UserError(reason)
    tasks, models = parse_all("dataset", config.tasks), parse_all("model", config.models)
    points = list(itertools.product(tasks, models))
    recipes = list(dict.fromkeys(map(_recipe, names)))
    groups = {
        (i, recipe): _group(config, task, model, recipe)
        for i, (task, model) in enumerate(points)
        for recipe in recipes
    }
    settings = [_setting(groups[i, recipes[0]]) for i in range(len(points))]  # before it trains
    found = dict(zip(groups, run_groups([*groups.values()], config.out, config.jobs), strict=True))
    tables, panels, runs = [], [], []
    for i, (task, model) in enumerate(points):
        title = f"{task.label}, {model.label}"
        print(f"measuring the steps of {title}", flush=True)
        runs.append(_measure(config, settings[i], names))
        courses = [_course(name, found[i, _recipe(name)], runs[-1]) for name in names]
        baseline = found[i, _recipe(config.baseline)] if config.baseline else None
        tables += race.tables(title, courses, _targets(config, baseline))
        panels.append((title, courses))
    race.plot(panels, config.out / "accuracy.png")
    write_json(config.out / "steps.json", runs)
    publish(config.out, dataclasses.asdict(config), [*found.values()], tables)


def _recipe(name: str) -> str:
    """The recipe by which a contender's accuracy is found."""
    return _FLOAT if name in FLOATS else name


def _group(config: TimeConfig, task: Spec, model: Spec, recipe: str) -> Group:
    spec = parse("recipe", SPEED_RECIPES[recipe].spec)
    task = dataclasses.replace(task, options={**task.options, "test_each_epoch": True})
    group = config.group({"dataset": task, "model": model, "recipe": spec})
    if group.base.learning_rate is not None:
        return group
    return config.group(
        {"dataset": task, "model": model, "recipe": spec}, config.rates, config.tuning_seeds
    )


def _setting(group: Group) -> Setting:
    """What a step of the group's runs computes."""
    base = group.base
    if base.model in ("lstm", "gru", *TOKEN_MODELS):
        raise cli.UserError(
            f"{base.model} is not timed here: choose a convolutional network or vit_small."
        )
    dataset = load_dataset(base)
    base.check_batch(len(dataset.train))
    height, width = dataset.image_size
    setting = Setting(
        base.model, base.width, base.batch_size, height, dataset.num_classes, dataset.channels
    )
    if height != width or base.stem not in ("auto", setting.stem):
        raise cli.UserError(
            f"{group.name}: steps are timed on square images, with the stem usual for their size."
        )
    layers_of(setting)  # raises where the images are too small for the model
    return setting


def _measure(config: TimeConfig, setting: Setting, names: Sequence[str]) -> dict[str, Any]:
    """The times of whole steps, as :func:`experiments.bench.steps.measure_steps` gives them."""
    recipes = [name for name in names if name not in FLOATS or name == _FLOAT]
    implementation = config.implementation
    run = in_process(
        {
            "kind": "steps",
            "threads": machine.available_cpus(),
            "setting": dataclasses.asdict(setting),
            "recipes": recipes,
            "implementations": [implementation] if implementation else [],
            "contenders": [
                name if name in FLOATS else f"{name}/{implementation or 'auto'}" for name in names
            ],
            "phases": ["total"],
            "warmup": 1,
            "repeats": config.repeats,
        }
    )
    run["contenders"] = {name.partition("/")[0]: r for name, r in run["contenders"].items()}
    return run


def _course(name: str, result: Result, run: dict[str, Any]) -> race.Course:
    histories = list(result.histories.values())
    measured = run["contenders"][name]
    return race.Course(
        name,
        quantized=name not in FLOATS,
        variant=result.group.base.variant,
        rate=result.rate,
        step=measured["phases"]["total"]["median"] / 1e3,
        first=measured["first"],
        steps=[line["step"] for line in histories[0]] if histories else [],
        accuracy=[[100 * line["test_accuracy"] for line in history] for history in histories],
    )


def _targets(config: TimeConfig, baseline: Result | None) -> dict[str, float]:
    """Accuracies in %, by the titles of their columns."""
    targets = {f"{target:g} %": target for target in sorted(set(config.targets))}
    if baseline is not None and baseline.summaries:
        end = ACCURACY.of(baseline).mean
        targets[f"{config.baseline}'s {end:.1f} %"] = end
    return targets


if __name__ == "__main__":
    cli.run(main, TimeConfig)
