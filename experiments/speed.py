"""How fast a training step is, against the same model in float in JAX and in PyTorch.

    python -m experiments.speed --model vgg16 --json speed.json --plot speed.png
    python -m experiments.speed --layers     # kernel by kernel
    python -m experiments.speed --check      # do all implementations agree? e.g. on a GPU

The contenders take turns in one process, so that a slow spell of the machine hits all alike. They
are PyTorch (torch: fp32, torch_bf16: autocast, and each through torch.compile), JAX as a user
writes it (jax: fp32, jax_bf16), full_precision (fp32 with the library's convolutions) and the
recipes, as recipe/implementation.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import pathlib
from typing import Any

from experiments import cli
from experiments.bench import machine
from experiments.bench import report as speed_report
from experiments.bench.contenders import (
    PHASES,
    SPEED_RECIPES,
    Setting,
    resolve_implementations,
)
from experiments.bench.measure import in_process
from experiments.bench.steps import say
from experiments.cli import UserError
from experiments.data.text import LENGTH, NUM_CLASSES
from experiments.runs.folders import write_json
from experiments.show.style import FORMATS
from fqt_jax.models import KERAS_MODELS, MODELS, TORCH_MODELS
from fqt_jax.models.vit import PATCH


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    """What is measured."""

    model: str = "vgg16"
    """Model: vgg_small, vgg11, vgg13, vgg16, vgg19, resnet18, resnet34, resnet50, mobilenet,
    vit_small or gpt_small."""
    width: float = 1.0
    """Factor on the model's number of channels."""
    batch_size: int = 128
    """Images, or sequences of text, in a step."""
    image_size: int = 32
    """Height and width of the images; from 96 on the stem is that for ImageNet."""
    length: int = LENGTH
    """Characters in a sequence of text."""

    recipes: tuple[str, ...] = (
        "fqt1",
        "fqt1_plus",
        "fqt1_one_draw",
        "psq1",
        "qat",
        "full_precision",
    )
    """The library's recipes; fqt1_one_draw draws the samples of its backward pass once a step, and
    fqt1_budget and fqt1_plus_budget share the bits out among the layers."""
    implementations: tuple[str, ...] = ()
    """Of the kernels: names, or all for all that are available, the default of --check and
    --layers; the steps' default is auto, the best for each product."""
    contenders: tuple[str, ...] = ()
    """Only these, such as torch jax fqt1/xla; the default is all."""
    threads: tuple[str, ...] = ("1", "all")
    """Numbers of processors to use, one run for each; all: every one there is."""

    repeats: int = 5
    """Measurements of each time; the median counts."""
    warmup: int = 1
    """Runs of each before those; the first compiles."""
    memory: bool = False
    """Measure the peak of resident memory too, in a process for each contender."""
    layers: bool = False
    """Time the kernels on each quantized layer, instead of steps."""
    check: bool = False
    """Compare the implementations with the reference (with at most 8 images), instead of timing
    steps; the exit status is 1 if one differs."""

    json: pathlib.Path | None = None
    """Write everything that was measured to this file."""
    plot: pathlib.Path | None = None
    """Draw the steps' times to this file."""

    def __post_init__(self) -> None:
        # Those of other libraries' form, and recurrent ones, have no twin in PyTorch here.
        others = [*TORCH_MODELS, *KERAS_MODELS, "lstm", "gru"]
        models = [name for name in MODELS if name not in others]
        if self.model not in models:
            raise UserError(f"unknown model {self.model!r}; known models: {', '.join(models)}.")
        for name in self.recipes:
            if name not in SPEED_RECIPES:
                known = ", ".join(SPEED_RECIPES)
                raise UserError(f"unknown recipe {name!r}; known recipes: {known}.")
        try:
            resolve_implementations(self.implementations)
        except ValueError as error:
            raise UserError(str(error)) from None
        for name, lowest in (
            ("batch_size", 1),
            ("image_size", 1),
            ("length", 1),
            ("repeats", 1),
            ("warmup", 1),
        ):
            if getattr(self, name) < lowest:
                raise UserError(f"{name} must be at least {lowest}; got {getattr(self, name)}.")
        if not self.width > 0:
            raise UserError(f"width must be positive; got {self.width}.")
        if self.plot is not None and self.plot.suffix not in FORMATS:
            raise UserError(f"plot must end in {', '.join(FORMATS)}; got {self.plot}.")
        if self.plot is not None and (self.layers or self.check):
            raise UserError("plot draws the times of steps, which layers and check leave out.")
        if self.memory and (self.layers or self.check):
            raise UserError("memory is that of steps, which layers and check leave out.")
        idle = "image_size" if self.setting().is_text else "length"
        if getattr(self, idle) != getattr(SpeedConfig, idle):
            raise UserError(f"{idle} has no effect on {self.model}.")
        if self.model == "vit_small":
            self._check_patches()
        self.thread_counts()

    def _check_patches(self) -> None:
        patch = PATCH[self.setting().stem]
        if self.image_size % patch:
            raise UserError(
                f"image_size must be a multiple of {patch}, the size of a patch of vit_small; got "
                f"{self.image_size}."
            )

    def thread_counts(self) -> list[int]:
        """``threads`` as numbers."""
        most = machine.available_cpus()
        counts = []
        for text in self.threads:
            if text != "all" and not (text.isdecimal() and 1 <= int(text) <= most):
                raise UserError(f"threads must be from 1 to {most}, or all; got {text!r}.")
            counts.append(most if text == "all" else int(text))
        if min(counts, default=most) < most and not hasattr(os, "sched_setaffinity"):
            raise UserError(
                "this system cannot confine a process to some processors: --threads all."
            )
        return list(dict.fromkeys(counts))

    def setting(self) -> Setting:
        """The model and the data."""
        batch_size = min(self.batch_size, 8) if self.check else self.batch_size
        setting = Setting(self.model, self.width, batch_size, self.image_size, length=self.length)
        if setting.is_text:
            setting = dataclasses.replace(setting, num_classes=NUM_CLASSES)
        return setting

    def request(self, kind: str, threads: int, contender: str | None = None) -> dict[str, Any]:
        """What :func:`experiments.bench.measure.measure` takes, as JSON values."""
        return {
            "kind": kind,
            "threads": threads,
            "setting": dataclasses.asdict(self.setting()),
            "recipes": list(self.recipes),
            "implementations": list(self.implementations),
            "contenders": list(self.contenders if contender is None else [contender]),
            "phases": list(PHASES),
            "warmup": self.warmup,
            "repeats": self.repeats,
        }


def main(config: SpeedConfig) -> None:
    """Runs the experiment."""
    for path in (config.json, config.plot):
        if path is not None:
            _check_writable(path)
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("json", "plot")}
    report: dict[str, Any] = {"options": options, "runs": [], "layers": [], "check": []}
    if config.check:
        report["check"] = [in_process(config.request("check", max(config.thread_counts())))]
    for threads in config.thread_counts():
        if config.layers:
            say(f"{threads} threads: layers")
            report["layers"].append(in_process(config.request("layers", threads)))
        elif not config.check:
            say(f"{threads} threads: steps")
            run = in_process(config.request("steps", threads))
            for name, result in run["contenders"].items() if config.memory else ():
                say(f"  resident memory of {name}")
                result["rss"] = in_process(config.request("rss", threads, name))
            report["runs"].append(run)
    print(speed_report.tables(report, config.setting()))
    if config.json is not None:
        write_json(config.json, report)
    if config.plot is not None:
        speed_report.plot(report["runs"], config.setting(), config.plot)
    if not all(line["ok"] for run in report["check"] for line in run["check"]):
        raise SystemExit(1)


def _check_writable(path: pathlib.Path) -> None:
    """Raises what writing the file would raise, and leaves nothing behind."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists():
        path.open("a").close()
        return
    path.open("x").close()
    path.unlink()


if __name__ == "__main__":
    cli.run(main, SpeedConfig)
